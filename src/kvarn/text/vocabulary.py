"""`Vocabulary`: the tokens of a model and what each stands for, whichever file they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from kvarn.text.packed_texts import PackedTexts

SPACE = "▁"
"""SentencePiece's mark for a space (U+2581)."""

END_OF_TURN = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>",
    "[EOT]", "<|return|>", "<|call|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>",
})  # fmt: skip
"""Tokens that end an answer in every model that has them, also where its files do not say so."""


class Pieces(Enum):
    """How a token's spelling stands for bytes."""

    BYTES = "bytes"
    """GPT-2's byte characters (`byte_of_character`)."""
    SPACES = "spaces"
    """UTF-8 with ▁ for a space; `<0xNN>` for single bytes (SentencePiece)."""


class Encoder(Protocol):
    """Text to token ids."""

    def encode(self, text: str, *, parse_special: bool, literal: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Token ids of well-formed text, without BOS and EOS.

        parse_special: special tokens spelt out in the text become those tokens. literal: ordered, disjoint spans
        (start, end) of the text in which they do not, all the same.
        """
        ...


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's tables and its rules for special tokens."""

    tokens: PackedTexts
    """Spelling by id; empty for an id without a token."""
    pieces: Pieces
    encoder: Encoder
    special: frozenset[int]
    """Control and unknown tokens: no text of an answer."""
    verbatim: frozenset[int]
    """Tokens whose spelling is their text: special ones and those that were added by hand."""
    byte_tokens: frozenset[int]
    """Tokens spelt <0xNN> that stand for one byte."""
    padding: frozenset[int]
    """Ids that only fill the embedding up; they have no text."""
    bos: int | None
    eos: tuple[int, ...]
    """Tokens that end an answer; the first is what `add_eos` adds."""
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    """Whether encoding puts a space before the text, which decoding takes away."""
    names: tuple[tuple[str, str], ...] = ()
    """Further template variables such as ("unk_token", "<unk>")."""


def byte_of_character() -> dict[str, int]:
    """GPT-2's table of characters for bytes (Radford et al. 2019, section 2.2, and its released encoder).

    Printable bytes of Latin-1 stand for themselves, the others are numbered from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(printable))
    table = {chr(byte): byte for byte in printable}
    table.update((chr(0x100 + index), byte) for index, byte in enumerate(others))
    return table


def end_tokens(tokens: Sequence[str], special: frozenset[int], named: Sequence[int | None]) -> tuple[int, ...]:
    """Ids that end an answer: the named ones in order, then the special tokens of `END_OF_TURN`.

    Where `<|return|>` ends an answer (harmony vocabularies), `<|end|>` only ends a part of it.
    """
    texts = {tokens[index]: index for index in sorted(special) if tokens[index] in END_OF_TURN}
    if "<|return|>" in texts:
        texts.pop("<|end|>", None)
    ids = [index for index in named if index is not None]
    return tuple(dict.fromkeys([*ids, *texts.values()]))
