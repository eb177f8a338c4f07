"""Tiny random models as GGUF files with a vocabulary of bytes, so that a test can go through the real loader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvarn.models.registry import find_family, program_from_config
from kvarn.models.source import reference_of
from kvarn.tensors import DType, Tensor
from kvarn.testing.files import MemoryFiles
from kvarn.testing.models import random_weight
from kvarn.testing.vocabulary import byte_vocabulary

EPSILON = 2.0**-17
"""About 1e-5, and the same in the float32 that a file holds."""

SIZES: dict[str, Any] = {
    "block_count": 2,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": EPSILON,
}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"attention.key_length": 32, "attention.value_length": 32},
    "gemma3": {"attention.key_length": 32, "attention.value_length": 32, "attention.sliding_window": 24},
    "gpt2": {"attention.head_count_kv": 4, "attention.layer_norm_epsilon": EPSILON},
}
"""Fields beside SIZES, by general.architecture and without its prefix."""


def tiny_gguf(
    architecture: str = "llama",
    *,
    seed: int = 0,
    dtype: DType = DType.F32,
    vocab_size: int = 259,
    tied: bool = True,
    metadata: Mapping[str, Any] | None = None,
    **changes: Any,
) -> MemoryFiles:
    """A random model in memory with the names and metadata that its GGUF file would have.

    dtype: as in `tiny_model`. tied: without a tensor output.weight. changes: fields with "." written as "__"
    (attention__head_count=8); metadata: further key-value pairs, which win. Raises KeyError for an architecture that
    kvarn does not run.
    """
    fields = {**SIZES, **CHANGES[architecture], **{key.replace("__", "."): value for key, value in changes.items()}}
    pairs: dict[str, Any] = {
        "general.architecture": architecture,
        "general.name": f"tiny {architecture}",
        **{f"{architecture}.{key}": value for key, value in fields.items()},
        **byte_vocabulary(vocab_size),
        **(metadata or {}),
    }
    family, _ = find_family(pairs, "gguf", "memory")
    present = () if tied else ("output.weight",)
    _, program = program_from_config(pairs, "gguf", path="memory", tensor_names=present)
    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    for weight in program.weights:
        ref = reference_of(family.gguf_names, weight.name)
        rows = weight.shape[0] if ref.part is None else weight.shape[0] * ref.part[1]
        if ref.name not in tensors:
            tensors[ref.name] = random_weight(rng, weight.name, (rows, *weight.shape[1:]), dtype)
    return MemoryFiles(pairs, tensors, path=Path(f"tiny-{architecture}.gguf"))


def write_gguf(path: Path, files: MemoryFiles) -> Path:
    """Writes files as one GGUF with the `gguf` package (an extra of development). Returns the path."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, files.metadata["general.architecture"])
    for key, value in files.metadata.items():
        if key != "general.architecture":
            _add_value(writer, key, value)
    for name, tensor in files.tensors.items():
        if tensor.dtype is DType.F32:
            writer.add_tensor(name, tensor.data.view("<f4").reshape(tensor.shape))
        elif tensor.dtype is DType.F16:
            writer.add_tensor(name, tensor.data.view("<f2").reshape(tensor.shape))
        else:
            rows = tensor.data.reshape(*tensor.shape[:-1], tensor.dtype.row_bytes(tensor.shape[-1]))
            writer.add_tensor(name, rows, raw_dtype=kinds[tensor.dtype.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny_gguf(path: Path, architecture: str = "llama", **settings: Any) -> Path:
    """`tiny_gguf(architecture, **settings)` as a file at `path`, which is returned."""
    return write_gguf(path, tiny_gguf(architecture, **settings))


def _add_value(writer: Any, key: str, value: object) -> None:
    """Adds a pair in the type that llama.cpp's converters give it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        if value:  # the format cannot say what an empty array would hold
            writer.add_array(key, value)
    else:
        raise TypeError(f"{key} has a value of type {type(value).__name__}")
