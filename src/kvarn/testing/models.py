"""Tiny random models of every family, with weights in memory, in any stored type."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvarn.models import program_from_config
from kvarn.models.in_memory import InMemoryModel
from kvarn.tensors import DType, Tensor

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "mistral": {**LLAMA_LIKE, "sliding_window": 24},
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 32},
    "gemma3_text": {**LLAMA_LIKE, "head_dim": 32, "sliding_window": 24, "sliding_window_pattern": 2},
    "gpt2": {"vocab_size": 259, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "eos_token_id": 257},
}
"""Config fields by model_type; token ids 0 … 255 are bytes, then BOS, EOS and one spare."""


def random_tensor(rng: np.random.Generator, dtype: DType, shape: tuple[int, ...], scale: float) -> Tensor:
    """Values of about `scale` around zero in the given stored type (quantized types: random bits, sane scales)."""
    if dtype is DType.F32:
        return Tensor.from_array((rng.standard_normal(shape) * scale).astype(np.float32))
    if dtype is DType.F16:
        return Tensor.from_array((rng.standard_normal(shape) * scale).astype(np.float16))
    if dtype is DType.BF16:
        bits = (rng.standard_normal(shape) * scale).astype(np.float32).view(np.uint32) >> 16
        return Tensor(dtype, shape, bits.astype(np.uint16).reshape(-1).view(np.uint8))
    rows = int(np.prod(shape[:-1]))
    blocks = rng.integers(0, 256, (rows * shape[-1] // dtype.block_size, dtype.block_bytes), dtype=np.uint8)
    for start, largest, sign in _HALVES[dtype]:
        halves = (rng.uniform(0.5, 1.5, len(blocks)) * scale * sign / largest).astype("<f2")
        blocks[:, start : start + 2] = halves.view(np.uint8).reshape(-1, 2)
    return Tensor(dtype, shape, blocks.reshape(-1))


_HALVES: dict[DType, tuple[tuple[int, float, int], ...]] = {
    DType.Q4_0: ((0, 4.0, 1),),
    DType.Q4_1: ((0, 4.0, 1), (2, 0.55, -1)),
    DType.Q5_0: ((0, 8.0, 1),),
    DType.Q5_1: ((0, 8.0, 1), (2, 0.5, -1)),
    DType.Q8_0: ((0, 64.0, 1),),
    DType.Q2_K: ((80, 12.0, 1), (82, 8.0, 1)),
    DType.Q3_K: ((108, 40.0, 1),),
    DType.Q4_K: ((0, 240.0, 1), (2, 32.0, 1)),
    DType.Q5_K: ((0, 480.0, 1), (2, 32.0, 1)),
    DType.Q6_K: ((208, 1200.0, 1),),
}
"""For each quantized type its fp16 fields: byte, divisor that brings the values to about the scale, sign."""


def tiny_model(family: str = "llama", *, seed: int = 0, dtype: DType = DType.F32, **changes: Any) -> InMemoryModel:
    """A random model of a family (a Hugging Face model_type), with `changes` to its config.json fields.

    dtype: stored type of all matrices whose rows hold whole blocks of it; the others, and vectors, are F32.
    """
    settings = {"model_type": family, **SETTINGS[family], **changes}
    config, program = program_from_config(settings, "hf")
    rng = np.random.default_rng(seed)
    tensors = {weight.name: random_weight(rng, weight.name, weight.shape, dtype) for weight in program.weights}
    return InMemoryModel(config, program, tensors)


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: DType) -> Tensor:
    """A weight of a size that keeps activations of about one, by its name in the program.

    Norm weights lie around one, biases around zero; both are F32, as are matrices whose rows hold no whole blocks.
    """
    if len(shape) == 1:
        offset = np.float32(1.0 if name.endswith("norm.weight") else 0.0)
        values = rng.standard_normal(shape).astype(np.float32) * np.float32(0.1) + offset
        return Tensor.from_array(values)
    fits = shape[-1] % dtype.block_size == 0
    scale = 1.0 if "embed" in name else 1.5 / shape[-1] ** 0.5
    return random_tensor(rng, dtype if fits else DType.F32, shape, scale)
