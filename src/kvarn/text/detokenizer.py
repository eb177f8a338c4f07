"""`IncrementalDetokenizer`: token ids to text as they come, whole code points only, ending at stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from kvarn.text.stops import StopMatcher
from kvarn.text.tokenizer import Tokenizer

MAX_CODE_POINT_BYTES = 4


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text that is safe to show at once. O(1) amortized work a token.

    What `append` and `finish` return joins to `tokenizer.decode` of all tokens, cut at the stop string that is
    completed first. Held back are the bytes of an unfinished code point and text that may be the beginning of a stop
    string, and nothing else.

    prompt_ids: the tokens before. The text then goes on from theirs: a code point that they began is finished, and a
    leading space stays. min_tokens: stop strings do not count in the text of so many first tokens.
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
        self._skip_special = skip_special_tokens
        self._include_stop = include_stop
        self._stops = StopMatcher(stop) if any(stop) else None
        self._tokens_without_stop = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        prompt_has_text = self._read_prompt(prompt_ids)
        self._strip_space = tokenizer.strips_leading_space and not prompt_has_text
        self._held = ""
        self._shown: list[str] = []
        self.stop_reason: str | None = None
        """The stop string that ended the text; None while there is none."""

    def _read_prompt(self, prompt_ids: Sequence[int]) -> bool:
        """Takes up a code point that the prompt leaves unfinished. Returns whether the prompt has any text."""
        tail = b""
        for token in reversed(prompt_ids):
            tail = self._tokenizer.text_bytes(token, self._skip_special) + tail
            if len(tail) >= MAX_CODE_POINT_BYTES:
                break
        self._decoder.decode(tail)
        return bool(tail)

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._shown)

    def append(self, token_id: int) -> str:
        """The text that this token makes safe to show; empty once stopped. Raises RequestError for a negative id."""
        if self.stop_reason is not None:
            return ""
        data = self._tokenizer.text_bytes(token_id, self._skip_special)
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        shown = self._show(self._decoder.decode(data), self._tokens_without_stop > 0)
        self._tokens_without_stop -= 1
        return shown

    def finish(self) -> str:
        """What was held back; call once, at the end."""
        if self.stop_reason is not None:
            return ""
        shown = self._show(self._decoder.decode(b"", final=True), self._tokens_without_stop > 0)
        if self.stop_reason is None and self._held:
            shown += self._held
            self._shown.append(self._held)
            self._held = ""
        return shown

    def _show(self, new: str, regardless: bool) -> str:
        """Moves text from held back to shown as far as the stop strings allow."""
        if not new:
            return ""
        text = self._held + new
        keep = 0
        if self._stops is not None and not regardless:
            found = self._stops.feed(new)
            if found is not None:
                stop, end = found
                cut = len(self._held) + end
                self.stop_reason = stop
                text = text[: cut if self._include_stop else cut - len(stop)]
            else:
                keep = self._stops.pending
        shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        if shown:
            self._shown.append(shown)
        return shown
