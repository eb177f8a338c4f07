"""Products with a weight, in whatever form it has: the kernel is chosen by the form and the number of rows.

| form | one row | several rows |
|---|---|---|
| Dense | cuBLAS through torch | cuBLAS through torch |
| Int4, Int8 | GEMV, float32 in registers | GEMM, weights rounded to the activations' type |
| Fp8 | GEMV, float32 in registers | to 16 rows as Int8; beyond, activations become FP8 too, a scale for each row |

Sums are float32 and always in the same order, so a call gives the same bits in every run. They differ by the number of
rows, as tiles and shares do.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

from kvarn.backends.cuda.kernels.fp8 import fp8_gemm_kernel, quantize_rows
from kvarn.backends.cuda.kernels.gemm import bytes_gemm_kernel, int4_gemm_kernel
from kvarn.backends.cuda.kernels.gemv import bytes_gemv_kernel, int4_gemv_kernel
from kvarn.backends.cuda.kernels.tiles import (
    BLOCK_K,
    FP8_TOKENS,
    Tiles,
    aligned,
    bytes_gemv_tiles,
    gemm_tiles,
    int4_gemv_tiles,
    product_workspace,
)
from kvarn.backends.cuda.kernels.unpack import E4M3, E4M3_BITS, EXPONENT, PLAIN, add_shares_kernel
from kvarn.backends.cuda.packing import Dense, Fp8, Int4, Int8, Weight


def linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, out: torch.Tensor, workspace: torch.Tensor | None = None
) -> torch.Tensor:
    """out = x weightᵀ + bias; returns out. x: (M, K), out: (M, N) of x's type or float32; any stride between rows.

    bias: (N,). workspace: uint8 with `workspace_bytes(weight, M)` bytes or more, overwritten; None: allocated for the
    call. Raises ValueError where widths do not fit or the workspace is too small.
    """
    _check(x, weight, out)
    tokens = x.shape[0]
    if not tokens:
        return out
    if isinstance(weight, Dense):
        return _dense(x, weight.weight, bias, out)
    parts = _Workspace(workspace, workspace_bytes(weight, tokens), x.device)
    tiles = linear_tiles(weight, tokens)
    target = out if tiles.shares == 1 else parts.take((tiles.shares, tokens, weight.rows), torch.float32)
    added = bias if tiles.shares == 1 else None
    match weight:
        case Int4():
            _int4(x, weight, added, target, tiles)
        case Fp8() if _multiplies_fp8(weight, tokens):
            _fp8(x, weight, added, target, tiles, parts)
        case Int8() | Fp8():
            _bytes(x, weight, added, target, tiles)
    if tiles.shares > 1:
        _add_shares(target, bias, out)
    return out


def dense_gemv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """As `linear` for one row and a dense weight, with the kernel for bytes instead of cuBLAS. K a multiple of 8."""
    rows, width = weight.shape
    tiles = bytes_gemv_tiles(rows, width)
    target = out if tiles.shares == 1 else torch.empty((tiles.shares, 1, rows), dtype=torch.float32, device=x.device)
    _bytes_gemv(x, weight, None, None, None, PLAIN, width, bias if tiles.shares == 1 else None, target, tiles)
    if tiles.shares > 1:
        _add_shares(target, bias, out)
    return out


def linear_tiles(weight: Int4 | Int8 | Fp8, tokens: int) -> Tiles:
    """How the product of `tokens` rows with a weight is cut."""
    if tokens > 1:
        return gemm_tiles(tokens, weight.rows, weight.width)
    choose = int4_gemv_tiles if isinstance(weight, Int4) else bytes_gemv_tiles
    return choose(weight.rows, weight.width)


def workspace_bytes(weight: Weight, tokens: int) -> int:
    """Bytes that `linear` needs beside its operands (see `product_workspace`)."""
    fp8_products = isinstance(weight, Fp8) and _converts_e4m3(weight.packed.device)
    return product_workspace(_kind(weight), weight.rows, weight.width, tokens, fp8_products=fp8_products)


def _kind(weight: Weight) -> str:
    return type(weight).__name__.lower()


class _Workspace:
    """Hands out parts of a buffer, each at a multiple of `ALIGNMENT`."""

    def __init__(self, buffer: torch.Tensor | None, needed: int, device: torch.device) -> None:
        if buffer is not None and buffer.nbytes < needed:
            raise ValueError(f"the workspace has {buffer.nbytes} bytes, this product needs {needed}")
        own = buffer is None and needed > 0
        self._buffer = torch.empty(needed, dtype=torch.uint8, device=device) if own else buffer
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        assert self._buffer is not None, "workspace_bytes is 0 where parts are taken"
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        part = self._buffer[self._used : self._used + size].view(dtype).view(shape)
        self._used += aligned(size)
        return part


def _check(x: torch.Tensor, weight: Weight, out: torch.Tensor) -> None:
    tokens, width = x.shape
    if width != weight.width or out.shape != (tokens, weight.rows):
        raise ValueError(
            f"a weight of {weight.rows} rows of {weight.width} maps ({tokens}, {weight.width}) to "
            f"({tokens}, {weight.rows}), not {tuple(x.shape)} to {tuple(out.shape)}"
        )
    if x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("the elements of a row of x and out must lie next to one another")


def _dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    if out.dtype == x.dtype:
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    if x.is_cuda:
        torch.mm(x, weight.t(), out.dtype, out=out)
    else:
        out.copy_(x.to(out.dtype) @ weight.t().to(out.dtype))
    return out if bias is None else out.add_(bias)


def _int4(x: torch.Tensor, weight: Int4, bias: torch.Tensor | None, out: torch.Tensor, tiles: Tiles) -> None:
    tokens, chunks = x.shape[0], weight.packed.shape[1] // 16
    offsets = weight.scales if weight.offsets is None else weight.offsets
    flags = {"OFFSETS": weight.offsets is not None, "BIAS": bias is not None, "GROUPS": BLOCK_K // weight.group}
    share = tiles.share_blocks(weight.width)
    added = weight.scales if bias is None else bias
    if tokens == 1:
        int4_gemv_kernel[(triton.cdiv(weight.rows, tiles.block_n), tiles.shares)](
            x, weight.packed, weight.scales, offsets, added, out,
            weight.rows, weight.width, chunks, share, weight.rows, EXPONENT,
            **flags, BLOCK_N=tiles.block_n, CHUNKS=tiles.blocks, num_warps=tiles.warps,
        )  # fmt: skip
        return
    grid = (triton.cdiv(tokens, tiles.block_m), triton.cdiv(weight.rows, tiles.block_n), tiles.shares)
    int4_gemm_kernel[grid](
        x, weight.packed, weight.scales, offsets, added, out,
        tokens, weight.rows, weight.width, chunks, share, x.stride(0), out.stride(-2), EXPONENT,
        **flags, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _bytes(x: torch.Tensor, weight: Int8 | Fp8, bias: torch.Tensor | None, out: torch.Tensor, tiles: Tiles) -> None:
    form = PLAIN if isinstance(weight, Int8) else E4M3 if _converts_e4m3(x.device) else E4M3_BITS
    offsets = weight.offsets if isinstance(weight, Int8) else None
    group = weight.group if isinstance(weight, Int8) else None
    tokens = x.shape[0]
    if tokens == 1:
        _bytes_gemv(x, weight.packed, weight.scales, offsets, group, form, weight.width, bias, out, tiles)
        return
    columns = weight.packed.shape[1]
    grid = (triton.cdiv(tokens, tiles.block_m), triton.cdiv(weight.rows, tiles.block_n), tiles.shares)
    bytes_gemm_kernel[grid](
        x, weight.packed, weight.scales, weight.scales if offsets is None else offsets,
        weight.scales if bias is None else bias, out,
        tokens, weight.rows, weight.width, columns, weight.scales.shape[1], tiles.share_blocks(columns) * BLOCK_K,
        x.stride(0), out.stride(-2),
        FORM=form, SCALES="row" if group is None else "group", OFFSETS=offsets is not None, BIAS=bias is not None,
        GROUP=group or BLOCK_K, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _bytes_gemv(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor | None, offsets: torch.Tensor | None,
    group: int | None, form: object, width: int, bias: torch.Tensor | None, out: torch.Tensor, tiles: Tiles,
) -> None:  # fmt: skip
    rows, columns = packed.shape
    unused = x  # where a kernel reads nothing
    bytes_gemv_kernel[(triton.cdiv(rows, tiles.block_n), tiles.shares)](
        x, packed, unused if scales is None else scales, unused if offsets is None else offsets,
        unused if bias is None else bias, out,
        rows, width, columns, 1 if scales is None else scales.shape[1], tiles.share_blocks(columns) * BLOCK_K, rows,
        FORM=form, SCALES="none" if scales is None else "row" if group is None else "group",
        OFFSETS=offsets is not None, BIAS=bias is not None,
        GROUP=group or BLOCK_K, BLOCK_N=tiles.block_n, PARTS=tiles.blocks, num_warps=tiles.warps,
    )  # fmt: skip


def _fp8(
    x: torch.Tensor, weight: Fp8, bias: torch.Tensor | None, out: torch.Tensor, tiles: Tiles, parts: _Workspace
) -> None:
    tokens, columns = x.shape[0], weight.packed.shape[1]
    codes = parts.take((tokens, columns), torch.uint8)
    scales = parts.take((tokens,), torch.float32)
    quantize_rows(x, codes, scales)
    grid = (triton.cdiv(tokens, tiles.block_m), triton.cdiv(weight.rows, tiles.block_n), tiles.shares)
    fp8_gemm_kernel[grid](
        codes, scales, weight.packed, weight.scales, weight.scales if bias is None else bias, out,
        tokens, weight.rows, columns, tiles.share_blocks(columns) * BLOCK_K, out.stride(-2),
        BIAS=bias is not None, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=BLOCK_K,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _add_shares(partial: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    shares, tokens, rows = partial.shape
    add_shares_kernel[(tokens, triton.cdiv(rows, 1024))](
        partial, partial if bias is None else bias, out, tokens, rows, out.stride(0),
        SHARES=shares, BIAS=bias is not None, BLOCK=1024,
    )  # fmt: skip


def _multiplies_fp8(weight: Weight, tokens: int) -> bool:
    return isinstance(weight, Fp8) and tokens > FP8_TOKENS and _converts_e4m3(weight.packed.device)


@lru_cache(maxsize=16)
def _converts_e4m3(device: torch.device) -> bool:
    """Whether the card knows e4m3 (Ada, Hopper and later). The interpreter, on the CPU, does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
