"""`IncrementalDetokenizer`: token ids to text as they come, whole code points only, ending at stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from kvarn.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text that is safe to show at once. O(1) amortized work a token.

    The pieces that `append` and `finish` return join to the text of all tokens, cut at the first stop string. Bytes of
    an unfinished code point, and text that may be the beginning of a stop string, are held back. prompt_ids: the tokens
    before; with any, a leading space belongs to the text. min_tokens: stop strings are looked for in the text after so
    many tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._skip_special = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer.strips_leading_space and not prompt_ids
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self._shown: list[str] = []
        self.stop_reason: str | None = None
        """The stop string that ended the text; None while there is none."""

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._shown)

    def append(self, token_id: int) -> str:
        """The text that this token makes safe to show; empty once stopped."""
        self._num_tokens += 1
        if self.stop_reason is not None or (self._skip_special and self._tokenizer.is_special(token_id)):
            return ""
        return self._take(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """What was held back; call once, at the end."""
        if self.stop_reason is not None:
            return ""
        shown = self._take(self._decoder.decode(b"", final=True))
        if self.stop_reason is not None:
            return shown
        rest, self._held = self._held, ""
        self._shown.append(rest)
        return shown + rest

    def _take(self, new: str) -> str:
        if self._strip and new:
            new, self._strip = new.removeprefix(" "), False
        if not new:
            return ""
        pending = self._held + new
        if not self._stop or self._num_tokens <= self._min_tokens:
            self._shown.append(pending)
            return pending
        found = [(at, stop) for stop in self._stop if (at := pending.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda hit: (hit[0], -len(hit[1])))
            self.stop_reason, self._held = stop, ""
            shown = pending[: at + len(stop)] if self._include_stop else pending[:at]
        else:
            hold = max(_overlap(pending, stop) for stop in self._stop)
            self._held = pending[len(pending) - hold :]
            shown = pending[: len(pending) - hold]
        self._shown.append(shown)
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` (and is not all of it)."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
