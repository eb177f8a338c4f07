"""Stored weights to float32, in registers; and how a program hands over its sums."""

from __future__ import annotations

import triton
import triton.language as tl

EXPONENT = 150 << 23
"""The exponent of 2^23 as a float has it: there the last bit of the fraction is worth 1. Kernels get it as an argument:
as a constant it would need a second logic operation for each nibble, which have room for one constant only."""
PLAIN = tl.constexpr(0)
"""A type that converts by itself: int8, and floats."""
E4M3 = tl.constexpr(1)
"""Codes of e4m3, converted by the card (from compute capability 8.9)."""
E4M3_BITS = tl.constexpr(2)
"""Codes of e4m3, converted by their bits."""


@triton.jit
def nibbles(words, plane, zero: tl.constexpr, exponent):
    """Nibble `plane` of int32 words, minus `zero`, as float32. plane: a constant or a tensor. exponent: `EXPONENT`.

    A nibble is masked where it lies and becomes the low end of a float's fraction: with shift s and the exponent of
    2^(23-s) the float is 2^(23-s) + q, exactly. That takes one logic operation and one subtraction, no conversion.
    """
    high = plane >= 5  # past the 23 bits of a fraction
    shift = 4 * plane - tl.where(high, 12, 0)
    base = exponent - (shift << 23)
    bits = (tl.where(high, words >> 12, words) & (15 << shift)) | base
    return bits.to(tl.float32, bitcast=True) - (base.to(tl.float32, bitcast=True) + zero)


@triton.jit
def floats(stored, FORM: tl.constexpr):
    """Stored weights as float32; FORM: one of the constants above."""
    if FORM == PLAIN:
        return stored.to(tl.float32)
    elif FORM == E4M3:
        return stored.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:  # exponent and fraction where a float has theirs: too small by 2^(127 - 7), subnormals too
        code = stored.to(tl.int32)
        bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def store_row(totals, bias, out, n, rows, out_stride, BIAS: tl.constexpr):
    """out[share, n] = totals (+ bias); totals: float32 [BLOCK_N]."""
    inside = n < rows
    if BIAS:
        totals += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(1).to(tl.int64) * out_stride + n, totals.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_tile(acc, bias, out, m, n, tokens, rows, out_stride, BIAS: tl.constexpr):
    """out[share, m, n] = acc (+ bias); acc: float32 [BLOCK_M, BLOCK_N]."""
    inside = n < rows
    if BIAS:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = (tl.program_id(2) * tokens + m[:, None]).to(tl.int64) * out_stride + n[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(m[:, None] < tokens) & inside[None, :])


@triton.jit
def add_shares_kernel(
    partial, bias, out, tokens, rows, out_stride, SHARES: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[m, n] = partial[0, m, n] + partial[1, m, n] + … (+ bias), in that order."""
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < rows
    total = tl.zeros((BLOCK,), tl.float32)
    for share in tl.static_range(SHARES):
        total += tl.load(partial + (share * tokens + m).to(tl.int64) * rows + n, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m.to(tl.int64) * out_stride + n, total.to(out.dtype.element_ty), mask=inside)
