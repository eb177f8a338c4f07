"""`vocabulary_from_gguf`: tokenizers from a GGUF file's `tokenizer.ggml.*` metadata.

Two kinds: byte-level BPE with merges (`tokenizer.ggml.model` "gpt2") and SentencePiece's BPE with scores ("llama").
GGUF says nothing of Unicode normalization, so none is applied: decoding gives back the bytes that were encoded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from kvarn.errors import ModelFileError, UnsupportedModelError
from kvarn.text.bpe import ByteLevelBPE, FragmentEncoder, PartitionedEncoder
from kvarn.text.packed_texts import PackedTexts
from kvarn.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from kvarn.text.special import Partition
from kvarn.text.spm import SentencePieceBPE
from kvarn.text.vocabulary import END_OF_TURN, Pieces, Vocabulary, end_tokens

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of the GGUF specification; 0 is "undefined"."""
PREFIX = "tokenizer.ggml."
NO_TOKEN = 0xFFFFFFFF
"""What some converters write where there is no such token (-1 in 32 bits)."""
SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
"""Ids of SentencePiece's control tokens where the file names none."""
OTHER_MODELS = {
    "bert": "WordPiece", "t5": "Unigram", "rwkv": "RWKV", "plamo2": "PLaMo", "gemma4": "SentencePiece BPE with merges",
}  # fmt: skip


class _Reader:
    """Checked access to the tokenizer's metadata."""

    def __init__(self, metadata: Mapping[str, Any], path: str) -> None:
        self.metadata = metadata
        self.path = path
        self.tokens: list[str] = self.array("tokens", {str})
        if not self.tokens:
            raise self.fail("tokens", "is empty")
        self.ids = dict(zip(self.tokens, range(len(self.tokens)), strict=True))
        self.ids.pop("", None)
        if len(self.ids) + self.tokens.count("") != len(self.tokens):
            twice = next(i for i, token in enumerate(self.tokens) if token and self.ids[token] != i)
            raise self.fail(
                "tokens", f"{self.tokens[twice]!r} appears twice, as {twice} and {self.ids[self.tokens[twice]]}"
            )
        self.types = self._types()
        self._by_type: dict[int, list[int]] | None = None

    def fail(self, key: str, message: str) -> ModelFileError:
        return ModelFileError(message, path=self.path, field=PREFIX + key)

    def array(self, key: str, kinds: set[type], length: int | None = None) -> list[Any]:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            raise self.fail(key, "is missing")
        if not isinstance(value, list) or not set(map(type, value)) <= kinds:
            raise self.fail(key, f"must be an array of {' or '.join(sorted(k.__name__ for k in kinds))}")
        if length is not None and len(value) != length:
            raise self.fail(key, f"has {len(value)} entries for {length} tokens")
        return value

    def _types(self) -> list[int]:
        if PREFIX + "token_type" not in self.metadata:
            return [NORMAL] * len(self.tokens)
        types: list[int] = self.array("token_type", {int}, len(self.tokens))
        strange = set(types).difference(range(BYTE + 1))
        if strange:
            raise self.fail("token_type", f"has the type {min(strange)}, which does not exist")
        return types

    def scores(self) -> list[float]:
        scores: list[float] = self.array("scores", {float, int}, len(self.tokens))
        if not math.isfinite(math.fsum(map(abs, scores))):
            raise self.fail("scores", "has an entry that is infinite or no number")
        return scores

    def merges(self) -> list[tuple[str, str]]:
        merges: list[str] = self.array("merges", {str})
        pairs = [tuple(merge.split(" ")) for merge in merges]
        if set(map(len, pairs)) - {2} or not all(map(all, pairs)):
            index = next(i for i, pair in enumerate(pairs) if len(pair) != 2 or not all(pair))
            raise self.fail("merges", f"entry {index}, {merges[index][:40]!r}, is no pair of tokens")
        if len(set(merges)) < len(merges):  # of repeated merges the first counts
            pairs = list(dict.fromkeys(pairs))
        return cast("list[tuple[str, str]]", pairs)

    def token_id(self, key: str, default: int | None = None) -> int | None:
        value = self.metadata.get(PREFIX + key)
        if value is None and default is not None and self.types[default : default + 1] in ([CONTROL], [UNKNOWN]):
            return default
        if value is None or value in (-1, NO_TOKEN):
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise self.fail(key, f"must be a token id below {len(self.tokens)}, not {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(PREFIX + key, default)
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, not {value!r}")
        return value

    def of_type(self, *types: int) -> frozenset[int]:
        if self._by_type is None:
            kinds = np.array(self.types, dtype=np.uint8)
            self._by_type = {kind: np.flatnonzero(kinds == kind).tolist() for kind in set(self.types) - {NORMAL}}
        return frozenset().union(*(self._by_type.get(kind, ()) for kind in types))

    def texts(self, ids: frozenset[int]) -> dict[str, int]:
        return {self.tokens[index]: index for index in ids}


def vocabulary_from_gguf(metadata: Mapping[str, Any], path: str) -> Vocabulary:
    """Builds the vocabulary and its encoder; `path` is for messages.

    Raises ModelFileError where the metadata are inconsistent, UnsupportedModelError for another kind of tokenizer.
    """
    model = metadata.get(PREFIX + "model")
    if not isinstance(model, str):
        what = "is missing: the file has no tokenizer" if model is None else f"must be text, not {model!r}"
        raise ModelFileError(what, path=path, field=f"{PREFIX}model")
    if model not in ("gpt2", "llama"):
        what = f"{PREFIX}model {model!r}" + (f" ({OTHER_MODELS[model]})" if model in OTHER_MODELS else "")
        raise UnsupportedModelError(
            f"{path}: {what} is not supported; byte-level BPE (gpt2) and SentencePiece BPE (llama) are"
        )
    reader = _Reader(metadata, path)
    defaults = SENTENCEPIECE_IDS if model == "llama" else {}
    named_ends = [reader.token_id(f"{name}_token_id", defaults.get(name)) for name in ("eos", "eot", "eom")]
    ends = {index for index in named_ends if index is not None} | {
        reader.ids[text] for text in END_OF_TURN if text in reader.ids
    }
    special = reader.of_type(CONTROL, UNKNOWN) | ends
    defined = reader.of_type(USER_DEFINED) - special
    if model == "gpt2":
        pre = _pre_tokenizer(reader)
        fragments: FragmentEncoder = _byte_level(reader, pre, special)
        pieces, space_prefix, add_bos = Pieces.BYTES, False, pre.add_bos
    else:
        space_prefix = reader.flag("add_space_prefix", True)
        fragments = _sentencepiece(reader, special, space_prefix)
        pieces, add_bos = Pieces.SPACES, True
    bos = reader.token_id("bos_token_id", defaults.get("bos"))
    return Vocabulary(
        tokens=PackedTexts(reader.tokens),
        pieces=pieces,
        encoder=PartitionedEncoder(fragments, Partition(reader.texts(special), reader.texts(defined))),
        special=special,
        verbatim=special | defined,
        byte_tokens=reader.of_type(BYTE),
        padding=reader.of_type(UNUSED) if model == "gpt2" else frozenset(),
        bos=bos,
        eos=end_tokens(reader.tokens, special, named_ends),
        add_bos=reader.flag("add_bos_token", add_bos) and bos is not None,
        add_eos=reader.flag("add_eos_token", False),
        space_prefix=space_prefix,
        names=_names(reader),
    )


def spellings_from_gguf(metadata: Mapping[str, Any], path: str) -> list[str]:
    """How each token is spelt, by id; "" for ids that only fill the embedding up. Raises ModelFileError."""
    reader = _Reader(metadata, path)
    tokens = list(reader.tokens)
    for index in reader.of_type(UNUSED) if metadata.get(f"{PREFIX}model") == "gpt2" else ():
        tokens[index] = ""
    return tokens


def _names(reader: _Reader) -> tuple[tuple[str, str], ...]:
    keys = {"unk_token": "unknown_token_id", "pad_token": "padding_token_id", "sep_token": "seperator_token_id"}
    ids = {name: reader.token_id(key) for name, key in keys.items()}
    return tuple((name, reader.tokens[index]) for name, index in ids.items() if index is not None)


def _pre_tokenizer(reader: _Reader) -> PreTokenizer:
    name = reader.metadata.get(PREFIX + "pre", "default")
    if not isinstance(name, str):
        raise reader.fail("pre", f"must be text, not {name!r}")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{reader.path}: {PREFIX}pre {name!r} is not known, and another kind would cut text into other tokens than "
            "the model was trained on"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(reader: _Reader, pre: PreTokenizer, special: frozenset[int]) -> ByteLevelBPE:
    vocabulary = reader.ids
    if pre.ignore_merges:  # a word that spells a special token must not become it
        vocabulary = {token: index for token, index in vocabulary.items() if index not in special}
    try:
        return ByteLevelBPE(vocabulary, reader.merges(), pre)
    except ValueError as error:
        raise reader.fail("merges", str(error)) from error


def _sentencepiece(reader: _Reader, special: frozenset[int], space_prefix: bool) -> SentencePieceBPE:
    scores = reader.scores()
    excluded = special | reader.of_type(BYTE)
    ids, ranked = dict(reader.ids), dict(zip(reader.tokens, scores, strict=True))
    for token in {"", *(reader.tokens[index] for index in excluded)}:
        ids.pop(token, None)
        ranked.pop(token, None)
    byte_ids = [reader.ids.get(f"<0x{byte:02X}>") for byte in range(256)]
    unknown = reader.token_id("unknown_token_id", SENTENCEPIECE_IDS["unknown"])
    if None in byte_ids and unknown is None:
        raise reader.fail("tokens", "has neither a token for every byte nor an unknown token")
    return SentencePieceBPE(
        ids,
        ranked,
        byte_ids=byte_ids,
        unknown=unknown,
        space_prefix=space_prefix,
    )
