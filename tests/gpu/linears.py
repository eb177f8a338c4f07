"""Weights for tests of the linears, of every form, and what a product with them should be."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.backends.cuda.packing import Dense, Int8, Weight, dequantize, pad_columns
from kvarn.backends.cuda.quantize import quantize_fp8, quantize_int4, quantize_int8

FORMS = (
    "int4-32", "int4-64", "int4-128", "int4-32-symmetric", "int4-128-symmetric",
    "int8", "int8-16", "int8-32", "int8-32-offsets", "fp8",
)  # fmt: skip


def make(form: str, rows: int, width: int, device: str, dtype: torch.dtype = torch.float16) -> Weight:
    """A weight of random numbers. Groups of int8 must divide the width."""
    values = torch.randn((rows, width), device=device) * torch.rand((rows, 1), device=device)
    name, *options = form.split("-")
    match name:
        case "dense":
            return Dense(values.to(dtype))
        case "int4":
            return quantize_int4(values, int(options[0]), symmetric="symmetric" in options)
        case "fp8":
            return quantize_fp8(values)
        case _ if not options:
            return quantize_int8(values)
    group = int(options[0])
    packed = pad_columns(torch.randint(-128, 128, (rows, width), dtype=torch.int8, device=device), 16)
    scales = torch.rand((rows, width // group), device=device).half()
    offsets = torch.randn((rows, width // group), device=device) * 30 if "offsets" in options else None
    return Int8(packed, scales, None if offsets is None else offsets.half(), group, width)


Wide = NDArray[np.float64]


def product(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> tuple[Wide, Wide]:
    """What `linear` should give, in NumPy's float64, and the sums of magnitudes that errors are measured by."""
    left, right = x.double().cpu().numpy(), dequantize(weight).double().cpu().numpy()
    added = np.zeros(right.shape[0]) if bias is None else bias.double().cpu().numpy()
    return left @ right.T + added, np.abs(left) @ np.abs(right).T + np.abs(added)


def largest_error(out: torch.Tensor, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> float:
    """The largest error of an element, in parts of the sum of the magnitudes of what it adds up. NaN counts as inf."""
    expected, magnitudes = product(x, weight, bias)
    errors = np.abs(out.double().cpu().numpy() - expected) / np.maximum(magnitudes, 1e-30)
    return float(np.nan_to_num(errors, nan=np.inf).max())
