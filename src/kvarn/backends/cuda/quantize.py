"""Weights into packed forms: floats to the nearest, and stored integers of GGUF files as they are, value for value.

What becomes of a stored type, without any loss (`from_stored`):

| stored | form | bits a weight |
|---|---|---|
| Q4_0 | Int4, group 32, fp16 scales | 4.5 |
| Q4_1 | Int4, group 32, fp16 scales and offsets | 5 |
| Q4_K | Int4, group 32, fp32 scales and offsets (products of two stored numbers, which fp16 cannot hold) | 6 |
| Q5_0, Q8_0 | Int8, group 32, fp16 scales | 8.5 |
| Q5_1 | Int8, group 32, fp16 scales and offsets | 9 |
| Q3_K, Q6_K | Int8, group 16, fp32 scales | 10 |
| Q5_K | Int8, group 32, fp32 scales and offsets | 10 |
| Q2_K | Int8, group 16, fp32 scales and offsets | 12 |
| F32, F16, BF16 | Dense, rounded to the type that is computed in | 16 |
"""

from __future__ import annotations

import numpy as np
import torch

from kvarn.backends.cuda.packing import (
    BYTES_ALIGNMENT,
    CHUNK,
    INT4_GROUPS,
    Dense,
    Fp8,
    Int4,
    Int8,
    Weight,
    pack_nibbles,
    pad_columns,
)
from kvarn.tensors import DType, Tensor
from kvarn.tensors.affine import affine
from kvarn.tensors.dequantize import dequantize

LARGEST_E4M3 = 448.0
FOUR_BITS = (DType.Q4_0, DType.Q4_1, DType.Q4_K)


def quantize_int4(values: torch.Tensor, group: int = 32, *, symmetric: bool = False) -> Int4:
    """The nearest of 16 levels for each group. values: float [N, K], any device; K may end within a group.

    Asymmetric: from the least to the largest value (a group that the row does not fill holds zeros too). Symmetric:
    -8 … 7 steps; the value of the largest magnitude is -8 steps. Levels are chosen for the scales as fp16 holds them.
    Raises ValueError for another group than 32, 64 or 128.
    """
    if group not in INT4_GROUPS:
        raise ValueError(f"group must be one of {', '.join(map(str, INT4_GROUPS))}, not {group}")
    rows, width = values.shape
    filled = torch.nn.functional.pad(values.float(), (0, -width % CHUNK))
    groups = filled.view(rows, -1, group)
    if symmetric:
        extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        scales, zero, offsets = (extreme / -8).half(), 8.0, None
    else:
        least, largest = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        offsets = least.half()
        scales, zero = ((largest - offsets.float()) / 15).half(), 0.0
        groups = groups - offsets.float()
    steps = scales.float()
    levels = torch.where(steps == 0, 0.0, groups / steps)
    packed = (levels + zero).round().clamp(0, 15).to(torch.uint8).view(rows, -1)[:, :width]
    return Int4(pack_nibbles(packed), scales[:, :, 0], None if offsets is None else offsets[:, :, 0], group, width)


def quantize_int8(values: torch.Tensor) -> Int8:
    """The nearest of -127 … 127 steps, one step size a row: its largest magnitude / 127. values: float [N, K]."""
    single = values.float()
    scales = single.abs().amax(1, keepdim=True) / 127
    levels = torch.where(scales == 0, 0.0, single / scales).round().clamp(-127, 127)
    return Int8(pad_columns(levels.to(torch.int8), BYTES_ALIGNMENT), scales, None, None, values.shape[1])


def quantize_fp8(values: torch.Tensor) -> Fp8:
    """The nearest of e4m3's numbers, with the row's largest magnitude at 448, e4m3's. values: float [N, K]."""
    single = values.float()
    scales = single.abs().amax(1, keepdim=True) / LARGEST_E4M3
    scaled = torch.where(scales == 0, 0.0, single / scales).clamp(-LARGEST_E4M3, LARGEST_E4M3)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    return Fp8(pad_columns(codes, BYTES_ALIGNMENT), scales, values.shape[1])


def from_stored(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Weight:
    """The matrix on the device with the values it is stored with; the module's table says in which form.

    dtype: of a Dense weight. A matrix takes a few times its size on the host while it is packed: pass row slices of a
    large one and stack them.
    """
    if not tensor.dtype.quantized:
        return Dense(torch.from_numpy(np.array(dequantize(tensor))).to(dtype).to(device))
    parts = affine(tensor)
    width = tensor.shape[1]
    integers = torch.from_numpy(parts.integers).to(device)
    scales = torch.from_numpy(parts.scales).to(device)
    offsets = None if parts.offsets is None else torch.from_numpy(parts.offsets).to(device)
    if tensor.dtype not in FOUR_BITS:
        return Int8(pad_columns(integers, BYTES_ALIGNMENT), scales, offsets, parts.group, width)
    nibbles = (integers + 8 if offsets is None else integers).to(torch.uint8)
    filling = -width % CHUNK // parts.group
    return Int4(
        pack_nibbles(nibbles),
        torch.nn.functional.pad(scales, (0, filling)),
        None if offsets is None else torch.nn.functional.pad(offsets, (0, filling)),
        parts.group,
        width,
    )
