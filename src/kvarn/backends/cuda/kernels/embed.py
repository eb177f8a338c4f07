"""Rows of tables: token embeddings and learned positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def embed(token_ids: torch.Tensor, table: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """out[t] = scale * table[token_ids[t]]. token_ids: int32[T]; table: (entries, width); out: (T, width)."""
    _launch(token_ids, table, None, scale, out)


def position_embed(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    """out[t] = x[t] + table[positions[t]], in place allowed. positions: int32[T]; x, out: (T, width)."""
    _launch(positions, table, x, 1.0, out)


def _launch(
    index: torch.Tensor, table: torch.Tensor, x: torch.Tensor | None, scale: float, out: torch.Tensor
) -> None:
    rows, width = out.shape
    _rows[(rows, triton.cdiv(width, _BLOCK))](
        index, table, out if x is None else x, out, width, table.stride(0), 0 if x is None else x.stride(0),
        out.stride(0), scale, ADD=x is not None, BLOCK=_BLOCK,
    )  # fmt: skip


@triton.jit
def _rows(
    index, table, x, out, width, table_stride, x_stride, out_stride, scale, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < width
    entry = tl.load(index + row).to(tl.int64)
    v = tl.load(table + entry * table_stride + element, mask=inside, other=0.0).to(tl.float32) * scale
    if ADD:
        v += tl.load(x + row * x_stride + element, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + element, v.to(out.dtype.element_ty), mask=inside)
