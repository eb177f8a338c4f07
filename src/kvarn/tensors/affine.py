"""Quantized tensors as what they are: integers, with a scale (and an offset) for each group of a row.

The definition of every quantized type (source: GGUF's specification, ggml's layouts). Each type's function takes blocks
as uint8[n, block_bytes]; an element is scale * integer (+ offset), in float32 with one rounding per operation, exactly
as the `gguf` package computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn.tensors.dtypes import DType
from kvarn.tensors.tensor import Tensor

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int8]
Floats = NDArray[np.float32]

FP16_SCALES = (DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.Q5_1, DType.Q8_0)
"""Types whose scales and offsets are stored as fp16; those of the others are products of two stored numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """integers: int8 [n, groups, size]. scales, offsets: float32 [n, groups]; offsets None: no type's zero is moved."""

    integers: Integers
    scales: Floats
    offsets: Floats | None = None

    def values(self) -> Floats:
        """float32 [n, groups * size]."""
        values: Floats = self.integers.astype(np.float32)
        values *= self.scales[:, :, None]
        if self.offsets is not None:
            values += self.offsets[:, :, None]
        return values.reshape(len(values), -1)


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """A matrix: row r's element k is scales[r, k // group] * integers[r, k] (+ offsets[r, k // group]).

    integers: int8 [rows, width]. scales, offsets: [rows, width / group], float16 where the type stores that, else
    float32. Owns its arrays.
    """

    integers: Integers
    scales: NDArray[np.floating]
    offsets: NDArray[np.floating] | None
    group: int


def affine(tensor: Tensor) -> Affine:
    """The integers of a quantized matrix. Raises ValueError for a plain type, and for what is no matrix."""
    if not tensor.dtype.quantized or len(tensor.shape) != 2:
        raise ValueError(f"a {tensor.dtype.name} tensor of shape {tensor.shape} is no matrix of integers with scales")
    rows, width = tensor.shape
    with np.errstate(invalid="ignore", over="ignore"):
        parts = BLOCKS[tensor.dtype](tensor.data.reshape(-1, tensor.dtype.block_bytes))
    held = np.float16 if tensor.dtype in FP16_SCALES else np.float32
    return Affine(
        integers=np.ascontiguousarray(parts.integers.reshape(rows, width)),
        scales=parts.scales.reshape(rows, -1).astype(held),
        offsets=None if parts.offsets is None else parts.offsets.reshape(rows, -1).astype(held),
        group=parts.integers.shape[-1],
    )


def _half(blocks: Bytes, start: int) -> Floats:
    """The fp16 at byte `start` of each block, float32[n, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """uint8[n, k] to uint8[n, 2k]: all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(blocks: Bytes, start: int) -> Bytes:
    """32 bits at byte `start` as uint8[n, 32] of 0 or 16."""
    bits: Bytes = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    return bits * np.uint8(16)


def _one_group(integers: Bytes, zero: int = 0) -> Integers:
    return (integers.view(np.int8) - np.int8(zero))[:, None, :]


def _q4_0(b: Bytes) -> Blocks:
    return Blocks(_one_group(_nibbles(b[:, 2:]), 8), _half(b, 0))


def _q4_1(b: Bytes) -> Blocks:
    return Blocks(_one_group(_nibbles(b[:, 4:])), _half(b, 0), _half(b, 2))


def _q5_0(b: Bytes) -> Blocks:
    return Blocks(_one_group(_nibbles(b[:, 6:]) | _fifth_bits(b, 2), 16), _half(b, 0))


def _q5_1(b: Bytes) -> Blocks:
    return Blocks(_one_group(_nibbles(b[:, 8:]) | _fifth_bits(b, 4)), _half(b, 0), _half(b, 2))


def _q8_0(b: Bytes) -> Blocks:
    return Blocks(_one_group(np.ascontiguousarray(b[:, 2:])), _half(b, 0))


def _k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The 6-bit scales and minima of Q4_K and Q5_K: uint8[n, 12] to two uint8[n, 8]."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=1)
    return scales, minima


def _minima_k(b: Bytes, q: Bytes) -> Blocks:
    """d * scale * q - dmin * minimum for 8 sub-blocks of 32. q: uint8[n, 8, 32]."""
    scales, minima = _k_scales(b[:, 4:16])
    offsets = -(_half(b, 2) * minima.astype(np.float32))
    return Blocks(q.view(np.int8), _half(b, 0) * scales.astype(np.float32), offsets)


def _q4_k(b: Bytes) -> Blocks:
    packed = b[:, 16:].reshape(-1, 4, 32)
    return _minima_k(b, np.stack([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32))


def _q5_k(b: Bytes) -> Blocks:
    packed = b[:, 48:].reshape(-1, 4, 32)
    low = np.stack([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    return _minima_k(b, low | (((b[:, 16:48][:, None, :] >> shifts) & 1) << 4))


def _q6_k(b: Bytes) -> Blocks:
    packed = b[:, :128].reshape(-1, 2, 64)
    low = np.stack([packed & 15, packed >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    q = (low | (high << 4)).view(np.int8) - np.int8(32)
    return Blocks(q.reshape(-1, 16, 16), _half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32))


def _two_bits(packed: Bytes) -> Bytes:
    """uint8[n, 64] to uint8[n, 256] values of two bits: per 32 bytes, four planes of 32."""
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]
    values: Bytes = ((packed.reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)).reshape(-1, 256)
    return values


def _q2_k(b: Bytes) -> Blocks:
    scales = b[:, :16]
    q = _two_bits(b[:, 16:80]).view(np.int8).reshape(-1, 16, 16)
    offsets = -(_half(b, 82) * (scales >> 4).astype(np.float32))
    return Blocks(q, _half(b, 80) * (scales & 15).astype(np.float32), offsets)


def _q3_k_scales(packed: Bytes) -> Integers:
    """The 16 signed 6-bit scales of Q3_K: uint8[n, 12] to int8[n, 16]."""
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[None, :, None]
    high = ((packed[:, 8:12][:, None, :] >> shifts) & 3).reshape(-1, 16)
    scales: Integers = (low | (high << 4)).astype(np.int8) - np.int8(32)
    return scales


def _q3_k(b: Bytes) -> Blocks:
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    absent = (((b[:, :32][:, None, :] >> shifts) & 1) ^ 1).reshape(-1, 256)
    q = _two_bits(b[:, 32:96]).view(np.int8) - (absent << 2).view(np.int8)
    return Blocks(q.reshape(-1, 16, 16), _half(b, 108) * _q3_k_scales(b[:, 96:108]).astype(np.float32))


BLOCKS: dict[DType, Callable[[Bytes], Blocks]] = {
    DType.Q4_0: _q4_0,
    DType.Q4_1: _q4_1,
    DType.Q5_0: _q5_0,
    DType.Q5_1: _q5_1,
    DType.Q8_0: _q8_0,
    DType.Q2_K: _q2_k,
    DType.Q3_K: _q3_k,
    DType.Q4_K: _q4_k,
    DType.Q5_K: _q5_k,
    DType.Q6_K: _q6_k,
}
"""Each type's blocks as integers with scales."""
