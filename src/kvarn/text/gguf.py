"""Tokenizers from GGUF metadata: byte-level BPE ("gpt2") and SentencePiece BPE with byte fallback ("llama")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, models, normalizers
from tokenizers import Tokenizer as Core

from kvarn.errors import ModelFileError, UnsupportedModelError
from kvarn.text.pretokenizers import PRE_TOKENIZERS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of the GGUF specification."""
PREFIX = "tokenizer.ggml."
SPACE = "▁"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's parts: core (added tokens registered), and what the metadata say about special tokens.

    pieces: "bytes" (GPT-2's byte characters) or "spaces" (SentencePiece's ▁ and <0xNN>).
    """

    core: Core
    pieces: str
    tokens: list[str]
    special: frozenset[int]
    added: frozenset[int]
    """Tokens whose text stands for itself: special and user-defined ones."""
    bos: int | None
    eos: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    space_prefix: bool


class _Reader:
    """Checked access to the tokenizer's metadata."""

    def __init__(self, metadata: Mapping[str, Any], path: str) -> None:
        self.metadata = metadata
        self.path = path

    def fail(self, key: str, message: str) -> ModelFileError:
        return ModelFileError(message, path=self.path, field=PREFIX + key)

    def array(self, key: str, kind: type | tuple[type, ...], length: int | None = None) -> list[Any]:
        value = self.metadata.get(PREFIX + key)
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self.fail(key, "is missing or no array of the right kind")
        if length is not None and len(value) != length:
            raise self.fail(key, f"has {len(value)} entries, there are {length} tokens")
        return value

    def token_id(self, key: str, size: int) -> int | None:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
            raise self.fail(key, f"must be a token id below {size}, not {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(PREFIX + key)
        return default if value is None else bool(value)


def vocabulary_from_gguf(metadata: Mapping[str, Any], path: str) -> Vocabulary:
    """Builds the tokenizer. Raises ModelFileError where metadata are inconsistent, UnsupportedModelError by kind."""
    reader = _Reader(metadata, path)
    model = metadata.get(PREFIX + "model")
    tokens: list[str] = reader.array("tokens", str)
    if not tokens:
        raise reader.fail("tokens", "is empty")
    types = (
        reader.array("token_type", int, len(tokens)) if PREFIX + "token_type" in metadata else [NORMAL] * len(tokens)
    )
    if model == "gpt2":
        core, pieces, space_prefix, add_bos = *_byte_level(reader, tokens), False, None
        pre = PRE_TOKENIZERS[metadata.get(PREFIX + "pre") or "default"]
        add_bos = pre.add_bos
    elif model == "llama":
        space_prefix = reader.flag("add_space_prefix", True)
        core, pieces, add_bos = _sentencepiece(reader, tokens, types, space_prefix), "spaces", True
    else:
        raise UnsupportedModelError(f"{path}: {PREFIX}model {model!r} is not supported (gpt2 and llama are)")
    special = [i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)]
    defined = [i for i, kind in enumerate(types) if kind == USER_DEFINED and tokens[i]]
    core.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in special if tokens[i]])
    core.add_tokens([AddedToken(tokens[i], normalized=False, special=False) for i in defined])
    size = len(tokens)
    eos = [reader.token_id(f"{name}_token_id", size) for name in ("eos", "eot", "eom")]
    return Vocabulary(
        core=core,
        pieces=pieces,
        tokens=tokens,
        special=frozenset(special),
        added=frozenset(special) | frozenset(defined),
        bos=reader.token_id("bos_token_id", size),
        eos=tuple(dict.fromkeys(i for i in eos if i is not None)),
        add_bos=reader.flag("add_bos_token", add_bos),
        add_eos=reader.flag("add_eos_token", False),
        space_prefix=space_prefix,
    )


def _byte_level(reader: _Reader, tokens: list[str]) -> tuple[Core, str]:
    name = reader.metadata.get(PREFIX + "pre") or "default"
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{reader.path}: {PREFIX}pre {name!r} is not known; running it as another kind would tokenize wrongly "
            f"(known: {', '.join(sorted(PRE_TOKENIZERS))})"
        )
    kind = PRE_TOKENIZERS[name]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = []
    for index, merge in enumerate(reader.array("merges", str)):
        left, separator, right = merge.partition(" ")
        if not separator:
            raise reader.fail("merges", f"entry {index} is no pair")
        if left in vocabulary and right in vocabulary and left + right in vocabulary:
            merges.append((left, right))
    core = Core(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind.ignore_merges))
    core.pre_tokenizer = kind.build()
    return core, "bytes"


def _sentencepiece(reader: _Reader, tokens: list[str], types: list[int], space_prefix: bool) -> Core:
    """SentencePiece's BPE (Kudo & Richardson 2018) joins the adjacent pair with the best score, so its merges are all
    pairs of tokens that make up a token, ordered by that token's score."""
    scores = reader.array("scores", (float, int), len(tokens))
    normal = {token: i for i, token in enumerate(tokens) if types[i] in (NORMAL, USER_DEFINED, UNUSED)}
    ranked: list[tuple[float, str, str]] = []
    for token, index in normal.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                ranked.append((-scores[index], left, right))
    ranked.sort(key=lambda entry: entry[0])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = reader.token_id("unknown_token_id", len(tokens))
    core = Core(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for _, left, right in ranked],
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else tokens[unknown],
        )
    )
    replace = normalizers.Replace(" ", SPACE)
    core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if space_prefix else replace
    return core
