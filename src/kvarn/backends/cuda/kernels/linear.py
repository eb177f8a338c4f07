"""Products with a weight, in whatever form it has."""

from __future__ import annotations

import torch

from kvarn.backends.cuda.packing import Dense, Weight, dequantize


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """out = x weightᵀ + bias. x: (M, K), out: (M, N) of x's type, or float32; returns out."""
    # The kernels for packed forms plug in here; this is what they are tested against.
    dense = weight.weight if isinstance(weight, Dense) else dequantize(weight).to(x.dtype)
    if out.dtype == x.dtype:
        torch.mm(x, dense.t(), out=out)
    else:
        out.copy_(x.float() @ dense.float().t())
    return out if bias is None else out.add_(bias)
