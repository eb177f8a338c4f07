"""float32 to stored tensors: the inverse of `dequantize`, for weights that kvarn makes itself."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvarn.tensors.dtypes import DType
from kvarn.tensors.tensor import Tensor


def quantize_q8_0(values: NDArray[np.floating]) -> Tensor:
    """The nearest Q8_0 tensor: of each 32 elements of a row the scale is the largest magnitude / 127, in float16.

    Raises ValueError where rows hold no whole blocks.
    """
    groups = _groups(values, DType.Q8_0)
    scales = np.abs(groups).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    stored = np.empty((len(groups), DType.Q8_0.block_bytes), np.uint8)
    stored[:, :2] = scales.astype("<f2").view(np.uint8)
    levels = groups * inverse
    whole = np.trunc(levels)
    whole += np.sign(levels) * (np.abs(levels - whole) >= 0.5)  # halves away from zero
    stored[:, 2:] = whole.astype(np.int8).view(np.uint8)
    return Tensor(DType.Q8_0, values.shape, stored.reshape(-1))


def quantize_q4_1(values: NDArray[np.floating]) -> Tensor:
    """The nearest Q4_1 tensor: of each 32 elements of a row 16 steps from the least to the largest, in float16.

    Raises ValueError where rows hold no whole blocks.
    """
    groups = _groups(values, DType.Q4_1)
    least, largest = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    steps = (largest - least) / np.float32(15)
    inverse = np.divide(np.float32(1), steps, out=np.zeros_like(steps), where=steps > 0)
    levels = np.minimum(15, (groups - least) * inverse + np.float32(0.5)).astype(np.uint8)
    stored = np.empty((len(groups), DType.Q4_1.block_bytes), np.uint8)
    stored[:, :2] = steps.astype("<f2").view(np.uint8)
    stored[:, 2:4] = least.astype("<f2").view(np.uint8)
    stored[:, 4:] = levels[:, :16] | levels[:, 16:] << 4
    return Tensor(DType.Q4_1, values.shape, stored.reshape(-1))


def _groups(values: NDArray[np.floating], dtype: DType) -> NDArray[np.float32]:
    if values.shape[-1] % dtype.block_size:
        raise ValueError(f"a row of {values.shape[-1]} elements is no multiple of {dtype.block_size}")
    return np.ascontiguousarray(values, np.float32).reshape(-1, dtype.block_size)
