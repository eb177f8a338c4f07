"""Several rows of activations times a weight of four or eight bits, on tensor cores.

Weights are unpacked in registers and rounded to the activations' type once (scale * q + offset); sums are float32. With
few rows the product is bound by the weight's bytes: K is cut into shares, which a second kernel adds up in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvarn.backends.cuda.kernels.unpack import floats, nibbles, store_tile


@triton.jit
def int4_gemm_kernel(
    x, words, scales, offsets, bias, out,
    tokens, rows, width, chunks, share_chunks, x_stride, out_stride, exponent,
    OFFSETS: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
        inputs = tl.load(x + m[:, None].to(tl.int64) * x_stride + k[None, :], mask=inside, other=0.0)
        tile = tl.load(words + row * (chunks * 16) + (chunk * 16 + word), mask=row < rows, other=0)
        place = row * (chunks * GROUPS) + (chunk * GROUPS + group)
        weight = nibbles(tile, plane, 0 if OFFSETS else 8, exponent)
        weight *= tl.load(scales + place, mask=row < rows, other=0.0).to(tl.float32)
        if OFFSETS:
            weight += tl.load(offsets + place, mask=row < rows, other=0.0).to(tl.float32)
        weight = tl.reshape(weight.to(inputs.dtype), (BLOCK_N, 128))
        acc = tl.dot(inputs, tl.trans(weight), acc)
    store_tile(acc, bias, out, m, n, tokens, rows, out_stride, BIAS)


@triton.jit
def bytes_gemm_kernel(
    x, packed, scales, offsets, bias, out,
    tokens, rows, width, columns, groups, share_width, x_stride, out_stride,
    FORM: tl.constexpr, SCALES: tl.constexpr, OFFSETS: tl.constexpr, BIAS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[share, m, n] = sum over the share's inputs of x[m] * weight[n] (+ bias); see `bytes_gemv_kernel`."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n[:, None, None].to(tl.int64)
    outer = tl.arange(0, 128 // GROUP)[None, :, None]
    inner = tl.arange(0, GROUP)[None, None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(2) * share_width
    for start in range(first, tl.minimum(first + share_width, columns), 128):
        k = start + tl.arange(0, 128)
        inside = (m[:, None] < tokens) & (k[None, :] < width)
        inputs = tl.load(x + m[:, None].to(tl.int64) * x_stride + k[None, :], mask=inside, other=0.0)
        column = start + outer * GROUP + inner
        stored = tl.load(packed + row * columns + column, mask=(row < rows) & (column < columns), other=0)
        weight = floats(stored, FORM)
        if SCALES == "group":
            group = start // GROUP + outer
            known = (row < rows) & (group < groups)
            weight *= tl.load(scales + row * groups + group, mask=known, other=0.0).to(tl.float32)
            if OFFSETS:
                weight += tl.load(offsets + row * groups + group, mask=known, other=0.0).to(tl.float32)
        weight = tl.reshape(weight.to(inputs.dtype), (BLOCK_N, 128))
        acc = tl.dot(inputs, tl.trans(weight), acc)
    if SCALES == "row":
        acc *= tl.load(scales + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    store_tile(acc, bias, out, m, n, tokens, rows, out_stride, BIAS)
