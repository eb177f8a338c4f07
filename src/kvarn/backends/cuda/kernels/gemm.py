"""Several rows of activations times a weight of four or eight bits, on tensor cores: weights become 16-bit in registers.

A weight is rounded to the activations' type once (scale * q + offset); sums are float32. With few rows the product is
bound by the weight's bytes: K is cut into shares, which a second kernel adds up in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nibbles(words, plane, zero: tl.constexpr, exponent):
    """Nibbles `plane` of int32 words minus `zero`, as float32: `gemv.nibble` for a tensor of planes."""
    high = plane >= 5
    shift = tl.where(high, 4 * plane - 12, 4 * plane)
    base = exponent - (shift << 23)
    bits = (tl.where(high, words >> 12, words) & (15 << shift)) | base
    return bits.to(tl.float32, bitcast=True) - (base.to(tl.float32, bitcast=True) + zero)


@triton.jit
def store_tile(acc, bias, out, m, n, tokens, rows, BIAS: tl.constexpr):
    """out[share, m, n] = acc (+ bias); acc: float32 [BLOCK_M, BLOCK_N]."""
    inside = n < rows
    if BIAS:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = (tl.program_id(2) * tokens + m[:, None]).to(tl.int64) * rows + n[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(m[:, None] < tokens) & inside[None, :])


@triton.jit
def int4_gemm_kernel(
    x, words, scales, offsets, bias, out,
    tokens, rows, width, chunks, share_chunks, exponent,
    OFFSETS: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[share, m, n] = sum over the share's chunks of x[m] * weight[n] (+ bias). GROUPS: groups in a chunk.

    A chunk of words [n, 1, 1, word] is unpacked to [n, group, plane of the group, word]: that is the order of K.
    """
    planes: tl.constexpr = 8 // GROUPS
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n[:, None, None, None].to(tl.int64)
    group = tl.arange(0, GROUPS)[None, :, None, None]
    plane = group * planes + tl.arange(0, planes)[None, None, :, None]
    word = tl.arange(0, 16)[None, None, None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(2) * share_chunks
    for chunk in range(first, tl.minimum(first + share_chunks, chunks)):
        k = chunk * 128 + tl.arange(0, 128)
        inside = (m[:, None] < tokens) & (k[None, :] < width)
        inputs = tl.load(x + m[:, None].to(tl.int64) * width + k[None, :], mask=inside, other=0.0)
        tile = tl.load(words + row * (chunks * 16) + (chunk * 16 + word), mask=row < rows, other=0)
        place = row * (chunks * GROUPS) + (chunk * GROUPS + group)
        weight = nibbles(tile, plane, 0 if OFFSETS else 8, exponent)
        weight *= tl.load(scales + place, mask=row < rows, other=0.0).to(tl.float32)
        if OFFSETS:
            weight += tl.load(offsets + place, mask=row < rows, other=0.0).to(tl.float32)
        acc = tl.dot(inputs.to(DOT), tl.trans(tl.reshape(weight.to(DOT), (BLOCK_N, 128))), acc)
    store_tile(acc, bias, out, m, n, tokens, rows, BIAS)
