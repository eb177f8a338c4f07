"""One row of activations times a weight: decode with one sequence, bound by the bytes of the weight.

Each program takes a few output rows and one share of the inputs (split-K), keeps one float32 sum for each position of
its tile, and adds them up once at its end. Tiles are [outer k, row, inner k]: lanes then run along the inputs of one
row, with 16-byte loads, and a thread's several rows share the activations that it has loaded. A tile has fewer inputs
than the program has threads, so that each thread loads its activations itself, with no exchange and no barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvarn.backends.cuda.kernels.unpack import floats, nibbles, store_row


@triton.jit
def int4_gemv_kernel(
    x, words, scales, offsets, bias, out,
    rows, width, chunks, share_chunks, out_stride, exponent,
    OFFSETS: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """out[share, n] = sum over the share's chunks of weight[n] * x (+ bias). GROUPS: groups of scales in a chunk.

    Sums are of whole numbers times activations; a group's scale multiplies them once.
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
                part += nibbles(tile, group * planes + p, 0 if OFFSETS else 8, exponent) * values
                if OFFSETS:
                    inputs += values
            place = row * (chunks * GROUPS) + (chunk * GROUPS + group)
            acc += part * tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
            if OFFSETS:
                acc += inputs * tl.load(offsets + place, mask=inside, other=0.0).to(tl.float32)
    store_row(tl.sum(tl.sum(acc, axis=2), axis=0), bias, out, n, rows, out_stride, BIAS)


@triton.jit
def bytes_gemv_kernel(
    x, packed, scales, offsets, bias, out,
    rows, width, columns, groups, share_width, out_stride,
    FORM: tl.constexpr, SCALES: tl.constexpr, OFFSETS: tl.constexpr, BIAS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[share, n] = sum over the share's inputs of weight[n] * x (+ bias); weights of one byte, or floats.

    packed: [rows, columns], columns >= width. SCALES: "none", "row" (scales [rows]) or "group" ([rows, groups], as
    offsets). GROUP divides 128. An iteration takes PARTS times 128 inputs, whose loads go out together.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n[None, :, None].to(tl.int64)
    outer = tl.arange(0, 128 // GROUP)[:, None, None]
    inner = tl.arange(0, GROUP)[None, None, :]
    acc = tl.zeros((128 // GROUP, BLOCK_N, GROUP), tl.float32)
    first = tl.program_id(1) * share_width
    for start in range(first, tl.minimum(first + share_width, columns), 128 * PARTS):
        for part in tl.static_range(PARTS):
            k = start + part * 128 + outer * GROUP + inner
            values = tl.load(x + k, mask=k < width, other=0.0).to(tl.float32)
            stored = tl.load(packed + row * columns + k, mask=(row < rows) & (k < columns), other=0)
            weight = floats(stored, FORM)
            if SCALES == "group":
                group = (start + part * 128) // GROUP + outer
                inside = (row < rows) & (group < groups)
                weight *= tl.load(scales + row * groups + group, mask=inside, other=0.0).to(tl.float32)
                if OFFSETS:
                    weight += tl.load(offsets + row * groups + group, mask=inside, other=0.0).to(tl.float32)
            acc += weight * values
    totals = tl.sum(tl.sum(acc, axis=2), axis=0)
    if SCALES == "row":
        totals *= tl.load(scales + n, mask=n < rows, other=0.0).to(tl.float32)
    store_row(totals, bias, out, n, rows, out_stride, BIAS)
