"""Short sequences of a step, decodes and drafts: keys split among programs, then merged (FlashDecoding, Dao 2023).

How many splits a sequence has follows from its own length and rows, so that a result does not depend on what else is in
the batch, nor on how many programs share the work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvarn.backends.cuda.kernels.attention_tile import (
    first_seen,
    known_tokens,
    load_queries,
    nothing_yet,
    store_result,
    walk,
)


@triton.jit
def split_size(keys, count, TILE: tl.constexpr, MIN_SPLIT: tl.constexpr, PARTIALS: tl.constexpr):
    """Keys in a split of a sequence with `count` rows, which see `keys`: PARTIALS // count splits at most."""
    return tl.maximum(MIN_SPLIT, tl.cdiv(tl.cdiv(keys, PARTIALS // count), TILE) * TILE)


@triton.jit
def attend_splits(
    item, head, tiles, programs, q, q_stride, out, out_stride, arrays, block_tables, table_stride, inner, factor,
    partial, stats,
    SHAPE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    SHORT_QUERIES: tl.constexpr, MIN_SPLIT: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Of a sequence, item // (tiles * programs), every tiles-th tile of rows and every programs-th split of its keys.

    Where there is one split its result is the sequence's. Else partial and stats get, at index
    (sequence * heads + head) * PARTIALS + split * rows + row, what `merge_kernel` reads.
    """
    sequence = item // (tiles * programs)
    query_begin = tl.load(arrays.query_start + sequence)
    query_end = tl.load(arrays.query_start + sequence + 1)
    count = query_end - query_begin
    if (count > 0) & (count <= SHORT_QUERIES):
        seq_len = tl.load(arrays.seq_lens + sequence)
        known = known_tokens(arrays, query_begin, query_end, seq_len, SHAPE)
        table = block_tables + sequence.to(tl.int64) * table_stride
        first = first_seen(seq_len - count, SHAPE)
        size = split_size(seq_len - first, count, TILE, MIN_SPLIT, PARTIALS)
        splits = tl.cdiv(seq_len - first, size)
        for tile in range(item // programs % tiles, tl.cdiv(count * SHAPE.group, ROWS), tiles):
            flat = tile * ROWS + tl.arange(0, ROWS)
            keep = flat < count * SHAPE.group
            queries = tl.minimum(flat // SHAPE.group, count - 1)
            rows = query_begin + queries
            heads = head * SHAPE.group + flat % SHAPE.group
            places = seq_len - count + queries
            x = load_queries(q, q_stride, rows, heads, keep, SHAPE)
            for split in range(item % programs, splits, programs):
                begin = first + split * size
                peak, total, mixed = walk(
                    nothing_yet(ROWS, SHAPE), x, begin, tl.minimum(begin + size, seq_len), arrays, table, head,
                    rows, places, known, query_end, seq_len, inner, factor, SHAPE, TILE, STAGES, True,
                )  # fmt: skip
                if splits == 1:
                    store_result(out, out_stride, mixed, total, rows, heads, keep, SHAPE)
                else:
                    before = (sequence.to(tl.int64) * (SHAPE.kv_heads * SHAPE.group) + heads) * PARTIALS
                    index = before + split * count + queries
                    dims = tl.arange(0, SHAPE.block_value)
                    inside = keep[:, None] & (dims < SHAPE.value_dim)[None, :]
                    tl.store(stats + index * 2, peak, mask=keep)
                    tl.store(stats + index * 2 + 1, total, mask=keep)
                    tl.store(partial + index[:, None] * SHAPE.value_dim + dims[None, :], mixed, mask=inside)


@triton.jit(do_not_specialize=["programs"])
def merge_kernel(
    partial, stats, out, out_stride, query_start, seq_lens, programs,
    SHAPE: tl.constexpr, TILE: tl.constexpr,
    SHORT_QUERIES: tl.constexpr, MIN_SPLIT: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Of a short sequence every programs-th row, for one query head: its splits as one result, in a fixed order."""
    sequence = tl.program_id(0) // programs
    head = tl.program_id(1)
    query_begin = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - query_begin
    if (count > 0) & (count <= SHORT_QUERIES):
        seq_len = tl.load(seq_lens + sequence)
        seen = seq_len - first_seen(seq_len - count, SHAPE)
        splits = tl.cdiv(seen, split_size(seen, count, TILE, MIN_SPLIT, PARTIALS))
        if splits > 1:
            split = tl.arange(0, PARTIALS)
            dims = tl.arange(0, SHAPE.block_value)
            for query in range(tl.program_id(0) % programs, count, programs):
                before = (sequence.to(tl.int64) * (SHAPE.kv_heads * SHAPE.group) + head) * PARTIALS
                index = before + split * count + query
                peaks = tl.load(stats + index * 2, mask=split < splits, other=-float("inf"))
                totals = tl.load(stats + index * 2 + 1, mask=split < splits, other=0.0)
                weights = tl.exp2(peaks - tl.max(peaks, axis=0))
                inside = (split < splits)[:, None] & (dims < SHAPE.value_dim)[None, :]
                mixed = tl.load(partial + index[:, None] * SHAPE.value_dim + dims[None, :], mask=inside, other=0.0)
                result = tl.sum(mixed * weights[:, None], axis=0) / tl.sum(totals * weights, axis=0)
                pointers = out + (query_begin + query).to(tl.int64) * out_stride + head * SHAPE.value_dim + dims
                tl.store(pointers, result.to(out.dtype.element_ty), mask=dims < SHAPE.value_dim)
