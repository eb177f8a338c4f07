"""Stored tensors to float32. `affine` has the definition of every quantized type."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvarn.tensors.affine import BLOCKS
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
    unpack = BLOCKS[tensor.dtype]
    for start in range(0, len(blocks), CHUNK_BLOCKS):
        with np.errstate(invalid="ignore", over="ignore"):
            values[start : start + CHUNK_BLOCKS] = unpack(blocks[start : start + CHUNK_BLOCKS]).values()
    return values.reshape(tensor.shape)


def _f32(data: Bytes) -> Floats:
    return np.frombuffer(data.tobytes(), dtype="<f4")


def _f16(data: Bytes) -> Floats:
    return np.frombuffer(data.tobytes(), dtype="<f2").astype(np.float32)


def _bf16(data: Bytes) -> Floats:
    return (np.frombuffer(data.tobytes(), dtype="<u2").astype(np.uint32) << 16).view(np.float32)


_PLAIN: dict[DType, Callable[[Bytes], Floats]] = {DType.F32: _f32, DType.F16: _f16, DType.BF16: _bf16}
