"""Replies read: when tokens came, how many, and what went wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvarn.bench.serve.client import TRUNCATED, Reply
from kvarn.bench.serve.ranks import ranked
from kvarn.bench.serve.sse import SseReader

REFUSED, STREAM_ERROR, NO_EVENT = "http", "error in stream", "not an event stream"
MAX_DETAIL = 300


@dataclass(frozen=True, slots=True)
class Answer:
    """One request and its answer. Times are seconds since the begin of the load."""

    planned: float
    sent: float
    end: float
    stamps: tuple[float, ...]
    """When each event with a part of the answer came."""
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    counted: bool = True
    """Whether the server said how many tokens they are; else one for each event, and the prompt's are unknown."""
    failure: str = ""
    """Its kind; "" where the answer came whole."""
    detail: str = ""
    text: str = ""

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token."""
        return self.stamps[0] - self.sent if self.stamps else None

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first, on average."""
        if self.output_tokens < 2 or len(self.stamps) < 2:
            return None
        return (self.stamps[-1] - self.stamps[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between events that follow each other."""
        return [late - early for early, late in itertools.pairwise(self.stamps)]

    @property
    def e2e(self) -> float:
        """Seconds to the end of the answer."""
        return self.end - self.sent

    @property
    def lag(self) -> float:
        """Seconds that it was sent too late."""
        return self.sent - self.planned

    def time(self, name: str, percentile: int) -> float | None:
        """One of `slo.TIMES`; of the gaps that percentile. None where there is nothing to take it of."""
        if name == "itl":
            gaps = sorted(self.gaps)
            return ranked(gaps, percentile) if gaps else None
        value: float | None = {"ttft": self.ttft, "tpot": self.tpot, "e2e": self.e2e}[name]
        return value


def read_answer(reply: Reply, begin: float = 0.0) -> Answer:
    """What a reply says. begin: of the load, by the reply's clock. Never raises: what is wrong is in the answer."""
    stream = _Stream()
    if reply.status == 200:
        stream.read(reply)
    failure, detail = reply.failure, reply.detail
    if not failure and reply.status != 200:
        failure, detail = f"{REFUSED} {reply.status}", _said(b"".join(piece for _, piece in reply.pieces))
    if stream.failure and failure in ("", TRUNCATED):
        failure, detail = stream.failure, stream.detail
    usage = stream.usage
    return Answer(
        planned=reply.planned - begin,
        sent=reply.sent - begin,
        end=reply.end - begin,
        stamps=tuple(stamp - begin for stamp in stream.stamps),
        prompt_tokens=_count(usage, "prompt_tokens"),
        output_tokens=_count(usage, "completion_tokens") if usage else len(stream.stamps),
        cached_tokens=_count(usage.get("prompt_tokens_details"), "cached_tokens"),
        counted=bool(usage),
        failure=failure,
        detail=detail[:MAX_DETAIL],
        text="".join(stream.texts),
    )


class _Stream:
    """The events of one stream."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self.texts: list[str] = []
        self.usage: dict[str, Any] = {}
        self.failure = self.detail = ""
        self._ended = False

    def read(self, reply: Reply) -> None:
        """All of it."""
        try:
            for stamp, data in _events(reply):
                self._event(stamp, data)
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            self._fail(NO_EVENT, str(error))
        if not self._ended:
            self._fail(*((TRUNCATED, "the stream has no end") if self.stamps or reply.failure else (NO_EVENT, "")))

    def _event(self, stamp: float, data: bytes) -> None:
        if data == b"[DONE]":
            self._ended = True
            return
        event = json.loads(data)
        if event.get("error"):
            self._fail(STREAM_ERROR, _said(data))
        self.usage = event.get("usage") or self.usage
        text = ""
        for choice in event.get("choices") or ():
            text += _text(choice)
            self._ended |= bool(choice.get("finish_reason"))
        if text:
            self.stamps.append(stamp)
            self.texts.append(text)

    def _fail(self, failure: str, detail: str) -> None:
        """The first one counts."""
        if not self.failure:
            self.failure, self.detail = failure, detail
            self._ended = True


def _events(reply: Reply) -> Iterator[tuple[float, bytes]]:
    reader = SseReader()
    for stamp, piece in reply.pieces:
        for data in reader.feed(piece):
            yield stamp, data
    for data in reader.close():
        yield reply.end, data


def _text(choice: dict[str, Any]) -> str:
    """The part of the answer in an event, thoughts and arguments of calls among it."""
    delta = choice.get("delta") or {}
    called = (call.get("function", {}).get("arguments") for call in delta.get("tool_calls") or ())
    thought = delta.get("reasoning_content") or delta.get("reasoning")
    return "".join(part for part in (choice.get("text"), thought, delta.get("content"), *called) if part)


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) else 0


def _said(body: bytes) -> str:
    """The message of an error's body, else its text."""
    text = body[:4096].decode("utf-8", "replace")
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        return text
