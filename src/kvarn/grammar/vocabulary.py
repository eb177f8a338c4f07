"""A model's tokens as grammars need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper


@dataclass(frozen=True, slots=True)
class GrammarVocabulary:
    """tokens: what each id contributes to the text, b"" for ids that only fill the logits up; special ones as spelt.

    ends: tokens that end an answer. encode: token ids of a text as the model knows it, which is how text is written
    that a grammar leaves no choice of; None: the longest token first.
    """

    tokens: Sequence[bytes]
    special: frozenset[int]
    ends: tuple[int, ...]
    encode: Callable[[str], Sequence[int]] | None = field(default=None, compare=False)

    def to_llguidance(self) -> LLTokenizer:
        """The vocabulary as llguidance's matchers need it. Takes about a second for 262,144 tokens."""
        from llguidance import LLTokenizer

        wrapped = cast("TokenizerWrapper", _Wrapped(self))
        return LLTokenizer(wrapped, n_vocab=len(self.tokens), eos_token=list(self.ends))


class _Wrapped:
    """What `LLTokenizer` asks a tokenizer for."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self.eos_token_id = vocabulary.ends[0]
        self.tokens = list(vocabulary.tokens)
        self.special_token_ids = sorted(vocabulary.special)
        self._encode = vocabulary.encode
        self._ids = {} if self._encode else {t: i for i, t in enumerate(self.tokens) if i not in vocabulary.special}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        if self._encode is not None:
            return list(self._encode(text if isinstance(text, str) else text.decode(errors="replace")))
        data = text.encode() if isinstance(text, str) else text
        ids = []
        while data:
            length = next((n for n in range(self._longest, 0, -1) if data[:n] in self._ids), 0)
            if length:
                ids.append(self._ids[data[:length]])
            data = data[length or 1 :]
        return ids


def new_matcher(tokenizer: LLTokenizer, source: str) -> LLMatcher:
    """A matcher at its beginning. Where the grammar is wrong, `get_error` of the matcher says why."""
    from llguidance import LLMatcher, LLParserLimits

    # Not verbose: messages go to clients, and what others wrote does not belong in them.
    return LLMatcher(tokenizer, source, log_level=0, limits=LLParserLimits(verbose_errors=False))


def cause(matcher: LLMatcher) -> str:
    """The matcher's error in one line."""
    lines = (line.strip() for line in matcher.get_error().replace("<non-verbose/>", "").splitlines())
    return " ".join(line for line in lines if line)[:500]
