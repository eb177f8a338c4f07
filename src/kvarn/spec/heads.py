"""Heads in a file: safetensors whose metadata says what they are and whose model's they are.

    metadata   format "kvarn-heads", version, kind, target (`content_key`), shape and training as JSON objects
    tensors    draft_ids, int32[draft_vocab]: the tokens that heads can say, ascending; and those of the kind

Nothing in a file is believed: names, types and shapes of all tensors follow from `HeadsShape` and are compared before
any is read, values must be finite. What wrong values do is that guesses are wrong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import ModelFileError
from kvarn.models.config import shown

FORMAT, VERSION = "kvarn-heads", "1"
KINDS = ("medusa", "eagle")
MAX_HEADS = 16
MAX_EXTENT = 1 << 24
MAX_FILE_BYTES = 16 << 30
DRAFT_IDS = "draft_ids"


@dataclass(frozen=True, slots=True)
class HeadsShape:
    """Sizes. The first three are the target's, the others the heads' own; those that a kind has no use for are 0."""

    hidden_size: int
    vocab_size: int
    draft_vocab: int
    """Tokens that heads can say."""
    num_heads: int
    """Medusa: tokens guessed ahead at most, one by each head. EAGLE: attention heads."""
    num_kv_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    window: int = 0
    """Tokens that EAGLE's layer attends to."""
    rope_theta: float = 0.0
    norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class Training:
    """Where heads come from. acceptance: held-out, by position: how often a guess is right where all before it are."""

    data_sha256: str = ""
    tokens: int = 0
    """Positions that they were trained on, those of all epochs counted."""
    steps: int = 0
    acceptance: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Heads of one model. tensors: by name, float16 (vectors float32). draft_ids: int32[draft_vocab], ascending."""

    kind: str
    target: str
    shape: HeadsShape
    training: Training
    draft_ids: NDArray[np.int32]
    tensors: Mapping[str, NDArray[np.floating]]


def tensor_shapes(kind: str, shape: HeadsShape) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a kind, by name, those of `draft_ids` not among them."""
    hidden, draft = shape.hidden_size, shape.draft_vocab
    if kind == "medusa":
        return {
            name: extents
            for head in range(shape.num_heads)
            for name, extents in {
                f"heads.{head}.block.weight": (hidden, hidden),
                f"heads.{head}.block.bias": (hidden,),
                f"heads.{head}.lm_head.weight": (draft, hidden),
            }.items()
        }
    queries, keys, wide = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim, shape.intermediate_size
    return {
        "token_norm.weight": (hidden,), "feature_norm.weight": (hidden,),
        "token.weight": (hidden, hidden), "feature.weight": (hidden, hidden),
        "attn_norm.weight": (hidden,),
        "attn.q.weight": (queries, hidden), "attn.k.weight": (keys, hidden), "attn.v.weight": (keys, hidden),
        "attn.o.weight": (hidden, queries),
        "mlp_norm.weight": (hidden,),
        "mlp.gate.weight": (wide, hidden), "mlp.up.weight": (wide, hidden), "mlp.down.weight": (hidden, wide),
        "norm.weight": (hidden,), "lm_head.weight": (draft, hidden),
    }  # fmt: skip


def save_heads(path: Path, heads: Heads) -> None:
    """Writes the file in one piece: whole, or not at all. Raises OSError."""
    from safetensors.numpy import save

    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "kind": heads.kind,
        "target": heads.target,
        "shape": json.dumps(asdict(heads.shape)),
        "training": json.dumps(asdict(heads.training)),
    }
    arrays = {name: np.ascontiguousarray(value) for name, value in heads.tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(save({**arrays, DRAFT_IDS: heads.draft_ids.astype(np.int32)}, metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_heads(path: Path, kind: str, target: str | None = None) -> Heads:
    """Reads and checks a file. kind: that it must be of. target: the `content_key` of the model that it must be for.

    Raises ModelFileError naming what is wrong.
    """
    return _Reader(path).read(kind, target)


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path

    def _fail(self, field: str, message: str) -> ModelFileError:
        return ModelFileError(message, path=str(self._path), field=field)

    def read(self, kind: str, target: str | None) -> Heads:
        from safetensors import SafetensorError, safe_open

        try:
            size = self._path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise self._fail("file", f"has {size} bytes, heads have at most {MAX_FILE_BYTES}")
            with safe_open(str(self._path), framework="numpy") as file:
                return self._read(file, kind, target)
        except OSError as error:
            raise self._fail("file", f"cannot be read: {error.strerror or error}") from error
        except SafetensorError as error:
            raise self._fail("file", f"is no safetensors file: {error}") from error

    def _read(self, file: Any, kind: str, target: str | None) -> Heads:
        metadata = file.metadata() or {}
        self._is(metadata, "format", FORMAT, "not a file of heads (`kvarn spec train` makes one)")
        self._is(metadata, "version", VERSION, f"this kvarn reads version {VERSION}")
        self._is(metadata, "kind", kind, f"method={kind} needs heads of that kind")
        made_for = metadata.get("target", "")
        if target is not None and made_for != target:
            raise self._fail(
                "target", f"trained for another model ({made_for[:12] or 'unnamed'}…, this one is {target[:12]}…)"
            )
        shape = self._shape(self._json(metadata, "shape"), kind)
        training = self._training(self._json(metadata, "training"))
        expected = tensor_shapes(kind, shape)
        self._check_tensors(file, {**expected, DRAFT_IDS: (shape.draft_vocab,)})
        tensors = {name: file.get_tensor(name) for name in expected}
        for name, values in tensors.items():
            if not np.isfinite(values).all():
                raise self._fail(name, "holds values that are not finite")
        return Heads(kind, made_for, shape, training, self._ids(file.get_tensor(DRAFT_IDS), shape), tensors)

    def _is(self, metadata: Mapping[str, str], field: str, wanted: str, otherwise: str) -> None:
        if metadata.get(field) != wanted:
            raise self._fail(field, f"{shown(metadata.get(field))}: {otherwise}")

    def _json(self, metadata: Mapping[str, str], field: str) -> dict[str, Any]:
        try:
            value = json.loads(metadata.get(field, ""))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self._fail(field, "must be a JSON object")
        return value

    def _shape(self, given: dict[str, Any], kind: str) -> HeadsShape:
        names = {field.name for field in fields(HeadsShape)}
        if given.keys() != names:
            raise self._fail("shape", f"must have {', '.join(sorted(names))}")
        for name in names - {"rope_theta", "norm_eps"}:
            least = 1 if name in ("hidden_size", "vocab_size", "draft_vocab", "num_heads") or kind == "eagle" else 0
            self._within(name, given[name], int, least, MAX_EXTENT)
        self._within("norm_eps", given["norm_eps"], float, 0.0, 1.0)
        self._within("rope_theta", given["rope_theta"], float, 1.0 if kind == "eagle" else 0.0, 1e12)
        shape = HeadsShape(**given)
        if kind == "medusa":
            self._within("num_heads", shape.num_heads, int, 1, MAX_HEADS)
        elif shape.num_heads % shape.num_kv_heads or shape.head_dim % 2:
            raise self._fail("shape", "num_heads must be a multiple of num_kv_heads, and head_dim even")
        self._within("draft_vocab", shape.draft_vocab, int, 1, shape.vocab_size)
        return shape

    def _within(self, name: str, value: object, kind: type, low: float, high: float) -> None:
        if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:  # type: ignore[operator]
            raise self._fail(f"shape.{name}", f"must be between {low} and {high}, not {shown(value)}")

    def _training(self, given: dict[str, Any]) -> Training:
        rates = given.get("acceptance")
        if not isinstance(rates, list) or not all(isinstance(rate, float) and 0 <= rate <= 1 for rate in rates):
            raise self._fail("training", "acceptance must be a list of rates")
        try:
            sha, tokens, steps = str(given["data_sha256"]), int(given["tokens"]), int(given["steps"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise self._fail("training", "must have data_sha256, tokens and steps") from None
        return Training(sha[:64], tokens, steps, tuple(rates))

    def _check_tensors(self, file: Any, expected: Mapping[str, tuple[int, ...]]) -> None:
        present = set(file.keys())
        for name in sorted(present ^ expected.keys()):
            raise self._fail(name, "the file lacks this tensor" if name in expected else "heads have no such tensor")
        for name, extents in expected.items():
            part = file.get_slice(name)
            if tuple(part.get_shape()) != extents:
                raise self._fail(name, f"has shape {tuple(part.get_shape())}, its sizes say {extents}")
            allowed = ("I32",) if name == DRAFT_IDS else ("F16", "F32")
            if part.get_dtype() not in allowed:
                raise self._fail(name, f"has type {part.get_dtype()}, it must be {' or '.join(allowed)}")

    def _ids(self, ids: NDArray[np.int32], shape: HeadsShape) -> NDArray[np.int32]:
        if ids[0] < 0 or ids[-1] >= shape.vocab_size or not (ids[1:] > ids[:-1]).all():
            raise self._fail(DRAFT_IDS, f"must be different tokens of {shape.vocab_size}, ascending")
        return ids
