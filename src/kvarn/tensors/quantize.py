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
    block = DType.Q8_0.block_size
    if values.shape[-1] % block:
        raise ValueError(f"a row of {values.shape[-1]} elements is no multiple of {block}")
    groups = np.ascontiguousarray(values, np.float32).reshape(-1, block)
    scales = np.abs(groups).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    stored = np.empty((len(groups), DType.Q8_0.block_bytes), np.uint8)
    stored[:, :2] = scales.astype("<f2").view(np.uint8)
    stored[:, 2:] = np.rint(groups * inverse).astype(np.int8).view(np.uint8)
    return Tensor(DType.Q8_0, values.shape, stored.reshape(-1))
