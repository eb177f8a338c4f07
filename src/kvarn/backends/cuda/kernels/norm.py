"""RMSNorm and LayerNorm, with the residual's addition before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
    *,
    layer: bool = False,
    groups: int = 1,
    residual: torch.Tensor | None = None,
    summed: torch.Tensor | None = None,
) -> None:
    """out = norm(x) * weight + bias, each of `groups` equal spans of a row by itself; in place allowed.

    RMSNorm (Zhang & Sennrich 2019, eq. 4), or LayerNorm (Ba et al. 2016, eq. 3) where `layer` is set. With a residual,
    summed = x + residual, rounded to its type, is what is normed; for one group. x, out, residual, summed: (rows,
    width), any stride between rows. weight, bias: float32 (width / groups). Sums are float32.
    """
    rows, width = x.shape
    span = width // groups
    if not rows:
        return
    _norm[(rows, groups)](
        x, x if residual is None else residual, x if summed is None else summed, out, weight,
        weight if bias is None else bias, span, x.stride(0), 0 if residual is None else residual.stride(0),
        0 if summed is None else summed.stride(0), out.stride(0), eps,
        LAYER=layer, ADD=residual is not None, BIAS=bias is not None, BLOCK=triton.next_power_of_2(span),
        num_warps=_warps(span),
    )  # fmt: skip


def _warps(span: int) -> int:
    return int(max(1, min(16, triton.next_power_of_2(span) // 256)))


@triton.jit
def _norm(
    x, residual, summed, out, weight, bias, span, x_stride, residual_stride, summed_stride, out_stride, eps,
    LAYER: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, BLOCK)
    inside = element < span
    at = tl.program_id(1) * span + element
    v = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(residual + row * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
        rounded = v.to(summed.dtype.element_ty)
        tl.store(summed + row * summed_stride + at, rounded, mask=inside)
        v = rounded.to(tl.float32)
    if LAYER:
        v -= tl.sum(v, axis=0) / span
        v = tl.where(inside, v, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(v * v, axis=0) / span + eps)
    v = v * scale * tl.load(weight + element, mask=inside, other=0.0)
    if BIAS:
        v += tl.load(bias + element, mask=inside, other=0.0)
    tl.store(out + row * out_stride + at, v.to(out.dtype.element_ty), mask=inside)
