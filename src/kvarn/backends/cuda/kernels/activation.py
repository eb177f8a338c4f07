"""Activation functions, alone and as gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_NUMBERS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_BLOCK = 1024


def activation(function: str, x: torch.Tensor, out: torch.Tensor) -> None:
    """out = f(x), in place allowed; see `ops.Activation`. x, out: (rows, width), any stride between rows."""
    _launch(function, x, x, out, gated=False)


def gated_activation(function: str, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    """out = f(gate) * up (Shazeer 2020), in place allowed. All (rows, width), any stride between rows."""
    _launch(function, gate, up, out, gated=True)


def _launch(function: str, x: torch.Tensor, up: torch.Tensor, out: torch.Tensor, *, gated: bool) -> None:
    rows, width = x.shape
    if not rows:
        return
    _activation[(rows, triton.cdiv(width, _BLOCK))](
        x, up, out, width, x.stride(0), up.stride(0), out.stride(0),
        FUNCTION=_NUMBERS[function], GATED=gated, BLOCK=_BLOCK,
    )  # fmt: skip


@triton.jit
def _activation(
    x, up, out, width, x_stride, up_stride, out_stride,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < width
    v = tl.load(x + row * x_stride + element, mask=inside, other=0.0).to(tl.float32)
    if FUNCTION == 0:
        v = v * tl.sigmoid(v)
    elif FUNCTION == 1:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif FUNCTION == 2:  # 1 + tanh(u) is 2 sigmoid(2 u)
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    else:
        v = tl.maximum(v, 0.0)
    if GATED:
        v *= tl.load(up + row * up_stride + element, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + element, v.to(out.dtype.element_ty), mask=inside)
