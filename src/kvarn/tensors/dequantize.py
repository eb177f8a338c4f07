"""Stored tensors to float32: the definition of every quantized type (source: GGUF's specification, ggml's layouts).

Each function takes blocks as uint8[n, block_bytes] and gives float32[n, block_size]. Arithmetic is in float32, one
rounding per written operation, so that the values are exactly those of the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvarn.tensors.dtypes import DType
from kvarn.tensors.tensor import Tensor

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

CHUNK_BLOCKS = 1 << 16


def dequantize(tensor: Tensor) -> Floats:
    """The tensor's values, float32 in its shape. Exact for every type (float32 holds them all)."""
    if not tensor.dtype.quantized:
        return _PLAIN[tensor.dtype](tensor.data).reshape(tensor.shape)
    blocks = tensor.data.reshape(-1, tensor.dtype.block_bytes)
    values = np.empty((len(blocks), tensor.dtype.block_size), dtype=np.float32)
    unpack = _BLOCKS[tensor.dtype]
    for start in range(0, len(blocks), CHUNK_BLOCKS):
        with np.errstate(invalid="ignore", over="ignore"):
            values[start : start + CHUNK_BLOCKS] = unpack(blocks[start : start + CHUNK_BLOCKS])
    return values.reshape(tensor.shape)


def _f32(data: Bytes) -> Floats:
    return np.frombuffer(data.tobytes(), dtype="<f4")


def _f16(data: Bytes) -> Floats:
    return np.frombuffer(data.tobytes(), dtype="<f2").astype(np.float32)


def _bf16(data: Bytes) -> Floats:
    return (np.frombuffer(data.tobytes(), dtype="<u2").astype(np.uint32) << 16).view(np.float32)


_PLAIN: dict[DType, Callable[[Bytes], Floats]] = {DType.F32: _f32, DType.F16: _f16, DType.BF16: _bf16}


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


def _q4_0(b: Bytes) -> Floats:
    return _half(b, 0) * (_nibbles(b[:, 2:]).astype(np.int8) - np.int8(8)).astype(np.float32)


def _q4_1(b: Bytes) -> Floats:
    return _half(b, 0) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b, 2)


def _q5_0(b: Bytes) -> Floats:
    values = (_nibbles(b[:, 6:]) | _fifth_bits(b, 2)).astype(np.int8) - np.int8(16)
    return _half(b, 0) * values.astype(np.float32)


def _q5_1(b: Bytes) -> Floats:
    return _half(b, 0) * (_nibbles(b[:, 8:]) | _fifth_bits(b, 4)).astype(np.float32) + _half(b, 2)


def _q8_0(b: Bytes) -> Floats:
    return _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The 6-bit scales and minima of Q4_K and Q5_K: uint8[n, 12] to two uint8[n, 8]."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=1)
    return scales, minima


def _affine_k(b: Bytes, q: Bytes) -> Floats:
    """d * scale * q - dmin * minimum for 8 sub-blocks of 32. q: uint8[n, 8, 32]."""
    scales, minima = k_scales(b[:, 4:16])
    d = (_half(b, 0) * scales.astype(np.float32))[:, :, None]
    m = (_half(b, 2) * minima.astype(np.float32))[:, :, None]
    return (d * q.astype(np.float32) - m).reshape(len(b), 256)


def _q4_k(b: Bytes) -> Floats:
    packed = b[:, 16:].reshape(-1, 4, 32)
    return _affine_k(b, np.stack([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32))


def _q5_k(b: Bytes) -> Floats:
    packed = b[:, 48:].reshape(-1, 4, 32)
    low = np.stack([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    return _affine_k(b, low | (((b[:, 16:48][:, None, :] >> shifts) & 1) << 4))


def _q6_k(b: Bytes) -> Floats:
    packed = b[:, :128].reshape(-1, 2, 64)
    low = np.stack([packed & 15, packed >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    q = ((low | (high << 4)).astype(np.int8) - np.int8(32)).reshape(-1, 16, 16).astype(np.float32)
    d = _half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)
    values: Floats = (d[:, :, None] * q).reshape(len(b), 256)
    return values


def _two_bits(packed: Bytes) -> Bytes:
    """uint8[n, 64] to uint8[n, 256] values of two bits: per 32 bytes, four planes of 32."""
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]
    values: Bytes = ((packed.reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)).reshape(-1, 256)
    return values


def _q2_k(b: Bytes) -> Floats:
    scales = b[:, :16]
    d = (_half(b, 80) * (scales & 15).astype(np.float32))[:, :, None]
    m = (_half(b, 82) * (scales >> 4).astype(np.float32))[:, :, None]
    q = _two_bits(b[:, 16:80]).reshape(-1, 16, 16).astype(np.float32)
    return (d * q - m).reshape(len(b), 256)


def q3_k_scales(packed: Bytes) -> NDArray[np.int8]:
    """The 16 signed 6-bit scales of Q3_K: uint8[n, 12] to int8[n, 16]."""
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[None, :, None]
    high = ((packed[:, 8:12][:, None, :] >> shifts) & 3).reshape(-1, 16)
    scales: NDArray[np.int8] = (low | (high << 4)).astype(np.int8) - np.int8(32)
    return scales


def _q3_k(b: Bytes) -> Floats:
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    absent = (((b[:, :32][:, None, :] >> shifts) & 1) ^ 1).reshape(-1, 256)
    q = (_two_bits(b[:, 32:96]).astype(np.int8) - (absent << 2).astype(np.int8)).reshape(-1, 16, 16)
    d = _half(b, 108) * q3_k_scales(b[:, 96:108]).astype(np.float32)
    return (d[:, :, None] * q.astype(np.float32)).reshape(len(b), 256)


_BLOCKS: dict[DType, Callable[[Bytes], Floats]] = {
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
