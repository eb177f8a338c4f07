"""Encoders of GGUF vocabularies: cut at special tokens, then byte-level BPE or SentencePiece for the text between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer as Core
from tokenizers import models

from kvarn.text.pretokenizers import PreTokenizer
from kvarn.text.special import Partition
from kvarn.text.vocabulary import byte_of_character

NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})


class FragmentEncoder(Protocol):
    """Encodes a text that holds no special token."""

    def encode(self, text: str, *, after_text: bool) -> list[int]:
        """Token ids. after_text: whether text (not the beginning, not a special token) comes right before."""
        ...


class ByteLevelBPE:
    """Byte-level BPE (Sennrich et al. 2016; on bytes: Radford et al. 2019, section 2.2), run by `tokenizers`.

    A byte that the vocabulary has no token for is left out, and what stands around it is not joined over it.

    Raises ValueError where a merge names a token that the vocabulary has not.
    """

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]], pre_tokenizer: PreTokenizer) -> None:
        try:
            model = models.BPE(vocabulary, merges, ignore_merges=pre_tokenizer.ignore_merges)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(str(error)) from error
        self._core = Core(model)
        missing = [c for c, byte in byte_of_character().items() if c not in vocabulary and byte not in NEVER_IN_UTF8]
        self._core.pre_tokenizer = pre_tokenizer.build("".join(missing))

    def encode(self, text: str, *, after_text: bool) -> list[int]:  # noqa: ARG002 (no prefix depends on it)
        """Token ids of a fragment."""
        # Unlike encode, the batch call lets other threads run: a long text takes seconds.
        (encoded,) = self._core.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoded.ids
        return ids


class PartitionedEncoder:
    """The encoder of a GGUF vocabulary."""

    def __init__(self, fragments: FragmentEncoder, partition: Partition) -> None:
        self._fragments = fragments
        self._partition = partition

    def encode(self, text: str, *, parse_special: bool, literal: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Token ids of the text; see `Encoder`."""
        ids: list[int] = []
        after_text = False
        for part in self._partition.split(text, parse_special=parse_special, literal=literal):
            if isinstance(part, int):
                ids.append(part)
                after_text = False
            else:
                ids += self._fragments.encode(part, after_text=after_text)
                after_text = True
        return ids
