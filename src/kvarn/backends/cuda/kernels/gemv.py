"""One row of activations times a weight: decode with one sequence, bound by the bytes of the weight.

Each program takes a few output rows and one share of the inputs (split-K), keeps one float32 sum per position of its
tile, and adds them up once at its end. Shares are added in their order by a second kernel, so results are the same in
every run. Loads of weights are 16 bytes a thread; the layout of four-bit words is in `packing.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl



@triton.jit
def nibble(words, plane: tl.constexpr, zero: tl.constexpr, exponent):
    """Nibble `plane` of int32 words, minus `zero`, as float32. exponent: `FRACTION_END`, as an argument of the kernel.

    The nibble is masked where it lies and becomes the low end of a float's fraction: with shift s and the exponent of
    2^(23-s) the float is 2^(23-s) + q, exactly. That takes one logic operation and one subtraction, no conversion; the
    exponent comes as an argument because that operation has room for one constant only.
    """
    shift: tl.constexpr = 4 * plane if plane < 5 else 4 * plane - 12  # a fraction has 23 bits
    if plane >= 5:
        words = words >> 12
    bits = (words & (15 << shift)) | (exponent - (shift << 23))
    return bits.to(tl.float32, bitcast=True) - ((1 << (23 - shift)) + zero)


@triton.jit
def _store(totals, bias, out, n, rows, BIAS: tl.constexpr):
    share = tl.program_id(1)
    inside = n < rows
    if BIAS:
        totals += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + share * rows + n, totals.to(out.dtype.element_ty), mask=inside)


@triton.jit
def int4_gemv_kernel(
    x, words, scales, offsets, bias, out,
    rows, width, chunks, share_chunks, exponent,
    OFFSETS: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """out[share, n] = sum over the share's chunks of weight[n] * x (+ bias). GROUPS: groups of scales in a chunk.

    Tiles are [chunk, row, word]: lanes then run along the words and chunks of one row, and a thread's several rows share
    the inputs that it has loaded.
    """
    planes: tl.constexpr = 8 // GROUPS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n[None, :, None].to(tl.int64)
    word = tl.arange(0, 16)[None, None, :]
    acc = tl.zeros((CHUNKS, BLOCK_N, 16), tl.float32)
    first = tl.program_id(1) * share_chunks
    for start in range(first, tl.minimum(first + share_chunks, chunks), CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)[:, None, None]
        inside = (row < rows) & (chunk < chunks)
        tile = tl.load(words + row * (chunks * 16) + (chunk * 16 + word), mask=inside, other=0)
        for group in tl.static_range(GROUPS):
            part = tl.zeros((CHUNKS, BLOCK_N, 16), tl.float32)
            inputs = tl.zeros((CHUNKS, 1, 16), tl.float32)
            for p in tl.static_range(planes):
                k = chunk * 128 + (group * planes + p) * 16 + word
                values = tl.load(x + k, mask=k < width, other=0.0).to(tl.float32)
                part += nibble(tile, group * planes + p, 0 if OFFSETS else 8, exponent) * values
                if OFFSETS:
                    inputs += values
            place = row * (chunks * GROUPS) + (chunk * GROUPS + group)
            acc += part * tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
            if OFFSETS:
                acc += inputs * tl.load(offsets + place, mask=inside, other=0.0).to(tl.float32)
    _store(tl.sum(tl.sum(acc, axis=2), axis=0), bias, out, n, rows, BIAS)
