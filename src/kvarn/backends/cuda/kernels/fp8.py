"""FP8 E4M3 times FP8 E4M3 on tensor cores (Micikevicius et al. 2022); one scale a row on both sides, float32 sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvarn.backends.cuda.kernels.unpack import store_tile

LARGEST = tl.constexpr(448.0)
"""The largest number of e4m3."""


@triton.jit
def e4m3_codes(x):
    """float32 of magnitude up to 448 to the codes of the nearest e4m3, ties to even, as uint8. By bits: any card can.

    From 2^-6 on, 20 bits of the fraction are rounded away and the exponent loses 127 - 7. Below, numbers are multiples
    of 2^-9, which is the last bit of a float near 2^14.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    magnitude = size.to(tl.float32, bitcast=True)
    small = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0.015625, small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantize_rows_kernel(x, codes, scales, width, columns, x_stride, BLOCK: tl.constexpr):
    """codes[m] = e4m3(x[m] / scales[m]), scales[m] = max |x[m]| / 448; zeros in the columns past `width`."""
    m = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(x + m * x_stride + k, mask=k < width, other=0.0).to(tl.float32)))
    scale = tl.max(largest, axis=0) / LARGEST
    tl.store(scales + m, scale)
    divisor = tl.where(scale > 0, scale, 1.0)
    for start in range(0, columns, BLOCK):
        k = start + tl.arange(0, BLOCK)
        values = tl.load(x + m * x_stride + k, mask=k < width, other=0.0).to(tl.float32)
        limited = tl.minimum(tl.maximum(values / divisor, -LARGEST), LARGEST)
        tl.store(codes + m * columns + k, e4m3_codes(limited), mask=k < columns)


@triton.jit
def fp8_gemm_kernel(
    codes, token_scales, packed, scales, bias, out,
    tokens, rows, columns, share_width, out_stride,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[share, m, n] = token_scales[m] * scales[n] * sum over the share's inputs of codes[m] * packed[n] (+ bias).

    The card's own sums of products of FP8 keep few bits: each BLOCK_K / 2 products are summed from zero, and such sums
    are added in float32.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    left_rows = codes + m[:, None].to(tl.int64) * columns
    right_rows = packed + n[:, None].to(tl.int64) * columns
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(2) * share_width
    for start in range(first, tl.minimum(first + share_width, columns), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k[None, :] < columns
        left = tl.load(left_rows + k[None, :], mask=(m[:, None] < tokens) & inside, other=0)
        right = tl.load(right_rows + k[None, :], mask=(n[:, None] < rows) & inside, other=0)
        left = left.to(tl.float8e4nv, bitcast=True)
        right = tl.trans(right.to(tl.float8e4nv, bitcast=True))
        acc = tl.dot(left, right, acc, max_num_imprecise_acc=BLOCK_K // 2)
    acc *= tl.load(token_scales + m, mask=m < tokens, other=0.0)[:, None]
    acc *= tl.load(scales + n, mask=n < rows, other=0.0)[None, :]
    store_tile(acc, bias, out, m, n, tokens, rows, out_stride, BIAS)


def quantize_rows(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Rows to e4m3. x: (M, K), any stride between rows; codes: uint8 (M, columns), columns >= K; scales: float32 (M,).

    The columns of codes past K become zero.
    """
    tokens, width = x.shape
    quantize_rows_kernel[(tokens,)](x, codes, scales, width, codes.shape[1], x.stride(0), BLOCK=2048, num_warps=8)
