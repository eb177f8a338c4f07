"""`CallReader`: text and calls in what a model says, piece by piece."""

from __future__ import annotations

import json
from dataclasses import dataclass

from kvarn.server.tools.formats import ToolFormat


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What came of one call. name: with the first delta of a call only. arguments: a piece of their JSON."""

    index: int
    name: str | None = None
    arguments: str = ""


class CallReader:
    """Reads one answer that follows a grammar of `ToolFormat`, and so is never wrong; it may be cut short.

    White space around calls is no text of the answer.
    """

    def __init__(self, form: ToolFormat, *, must: bool) -> None:
        """must: see `ToolFormat.grammar`."""
        self._form = form
        self._must = must
        self._anywhere = must or form.marked
        self._held = ""
        """What was not told yet: it may be the beginning of something."""
        self._in_call = False
        self._spoken = False
        self._last = ""
        """What was told of the arguments of a call that the answer ends with."""
        self.num_calls = 0

    def take(self, text: str) -> list[str | CallDelta]:
        """What a piece of text adds: text, and deltas of calls, in order."""
        self._held += text
        out: list[str | CallDelta] = []
        while (found := self._arguments() if self._in_call else self._text()) is not None:
            if found:
                out.append(found)
        return out

    def finish(self) -> list[str | CallDelta]:
        """What was held back of an answer that has ended."""
        held, self._held = self._held, ""
        if self._in_call and not self._form.marked:
            held = held.rstrip()
            held = held[:-1] if held.endswith("}") and _is_json(self._last + held[:-1]) else held
        if self._in_call:
            return [CallDelta(self.num_calls - 1, arguments=held)] if held else []
        # Where there are only calls this is the beginning of one that was cut short.
        return [held] if held and not self._must and (held.strip() or not self.num_calls) else []

    def _text(self) -> str | CallDelta | None:
        """The next text or the beginning of a call; None where more must come first."""
        at = self._held.find(self._form.begin)
        if at >= 0 and (self._anywhere or (at == 0 and not self._spoken)):
            before, after = self._held[:at].rstrip(), self._held[at + len(self._form.begin) :]
            if before:
                self._spoken = True
                self._held = self._held[at:]
                return before
            name, middle, rest = after.partition(self._form.middle)
            if not middle:
                return None
            self._held, self._in_call = rest, True
            self.num_calls += 1
            return CallDelta(self.num_calls - 1, json.loads(name))
        keep = _held_back(self._held, self._form.begin) if self._anywhere or not self._spoken else 0
        told = self._held[: len(self._held) - keep]
        told = told[: len(told.rstrip())]  # white space may turn out to stand before a call
        if not told:
            return None
        if self.num_calls and not self._spoken:
            told = told.lstrip()
        self._held = self._held[len(told) :]
        self._spoken = True
        return told

    def _arguments(self) -> CallDelta | None:
        """The next piece of arguments; None where more must come first."""
        told, end, rest = self._held.partition(self._form.end)
        if end and self._form.marked:
            self._held, self._in_call = rest, False
            return CallDelta(self.num_calls - 1, arguments=told)
        # An end that is a mere brace is the last one of the answer, so each may be it until the next one comes.
        keep = len(self._held) - self._held.rfind("}") if end else _held_back(self._held, self._form.end)
        told = self._held[: len(self._held) - keep]
        self._held = self._held[len(told) :]
        self._last += told
        return CallDelta(self.num_calls - 1, arguments=told) if told else None


def _held_back(text: str, mark: str) -> int:
    """Characters at the end of a text that may be the beginning of the mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
