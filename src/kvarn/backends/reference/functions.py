"""The arithmetic of each op on float32 arrays, as its paper writes it.

Shapes: T tokens, H heads, D head_dim, N context.

Rounding: inputs and results are float32. Norms sum in float64 and activation functions and rotation angles are computed
in float64, so that they are the float32 nearest to the definition; matrix products and softmax are float32 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvarn.program import RopeTable

Floats = NDArray[np.float32]
Wide = NDArray[np.float64]


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x / sqrt(mean(x²) + eps) * weight over the last axis (Zhang & Sennrich 2019, eq. 4)."""
    mean_square = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    result: Floats = (x / np.sqrt(mean_square + eps)).astype(np.float32) * weight
    return result


def layer_norm(x: Floats, weight: Floats, bias: Floats | None, eps: float) -> Floats:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (Ba et al. 2016, eq. 3)."""
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = np.mean(np.square(centred), axis=-1, keepdims=True)
    result: Floats = (centred / np.sqrt(variance + eps)).astype(np.float32) * weight
    return result if bias is None else result + bias


def rope(x: Floats, positions: NDArray[np.int32], table: RopeTable) -> Floats:
    """Rotates pairs of each head by position * inv_freq (Su et al. 2021, eq. 34). x: (T, H, D)."""
    angles = positions.astype(np.float64)[:, None] * np.asarray(table.inv_freq)[None, :]
    cos = (np.cos(angles) * table.attention_factor).astype(np.float32)[:, None, :]
    sin = (np.sin(angles) * table.attention_factor).astype(np.float32)[:, None, :]
    out = x.copy()
    rotated = x[..., : table.rotary_dim]
    if table.style == "halves":
        half = table.rotary_dim // 2
        first, second = rotated[..., :half], rotated[..., half:]
        out[..., :half] = first * cos - second * sin
        out[..., half : table.rotary_dim] = second * cos + first * sin
    else:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
        out[..., 0 : table.rotary_dim : 2] = first * cos - second * sin
        out[..., 1 : table.rotary_dim : 2] = second * cos + first * sin
    return out


def softmax(x: Floats) -> Floats:
    """exp(x - max) / sum over the last axis; -inf gives exactly 0."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    result: Floats = e / e.sum(axis=-1, keepdims=True)
    return result


def soft_cap(x: Floats, cap: float | None) -> Floats:
    """cap * tanh(x / cap) (Gemma Team 2024, section 2); x itself where cap is None."""
    return x if cap is None else (np.float32(cap) * np.tanh(x / np.float32(cap))).astype(np.float32)


def attention(
    q: Floats,
    k: Floats,
    v: Floats,
    positions: NDArray[np.int32],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Floats:
    """softmax(scale q kᵀ + mask) v of one sequence (Vaswani et al. 2017, eq. 1), causal, grouped heads.

    q: (T, H, D) at `positions`; k: (N, KV, D) and v: (N, KV, V) at positions 0 … N-1; result: (T, H, V). Query head h
    reads KV head h // (H / KV) (Ainslie et al. 2023).
    """
    tokens, heads, dim = q.shape
    context, kv_heads, _ = k.shape
    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, dim)
    scores = np.einsum("tkgd,nkd->kgtn", grouped, k, optimize=True) * np.float32(scale)
    scores = soft_cap(scores, softcap)
    key = np.arange(context)[None, :]
    visible = key <= positions[:, None]
    if window is not None:
        visible &= key > positions[:, None] - window
    weights = softmax(np.where(visible, scores, np.float32(-np.inf)))
    mixed: Floats = np.einsum("kgtn,nkv->tkgv", weights, v, optimize=True).reshape(tokens, heads, v.shape[2])
    return mixed


def silu(x: Wide) -> Wide:
    """x * sigmoid(x)."""
    with np.errstate(over="ignore"):  # exp(-x) is inf far below zero, where the quotient is rightly 0
        result: Wide = x / (1 + np.exp(-x))
    return result


def gelu(x: Wide) -> Wide:
    """x * P(X <= x) for X of the standard normal distribution."""
    below = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.flat], dtype=np.float64)
    result: Wide = x * below.reshape(x.shape)
    return result


def gelu_tanh(x: Wide) -> Wide:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³)))."""
    result: Wide = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return result


def relu(x: Wide) -> Wide:
    """max(x, 0)."""
    return np.maximum(x, 0)


ACTIVATIONS: dict[str, Callable[[Wide], Wide]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
}
"""Activation functions by the program's names (Hendrycks & Gimpel 2016 for both gelus)."""


def activation(function: str, x: Floats) -> Floats:
    """The activation of that name in the program's words."""
    return ACTIVATIONS[function](x.astype(np.float64)).astype(np.float32)


def stored_vectors(x: Floats, dtype: str) -> Floats:
    """Vectors (the last axis) as a cache of that type gives them back.

    float16 and float32: what the type cannot hold becomes the largest that it can. int8: symmetric, one scale a vector,
    max|x| / 127. (int4: `Int4LayerCache`.)
    """
    if dtype != "int8":
        limit = np.finfo(dtype).max
        stored: Floats = np.clip(x, -limit, limit).astype(dtype).astype(np.float32)
        return stored
    largest = np.abs(x).max(axis=-1, keepdims=True).astype(np.float32)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest / 127 > 1e-38)
    restored: Floats = np.rint(x * inverse) * (largest / np.float32(127))
    return restored
