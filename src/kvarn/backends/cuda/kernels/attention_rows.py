"""Long sequences of a step: a tile of rows a program, over all keys that they see (FlashAttention-2, Dao 2023)."""

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
def sequence_of(query_start, sequences, item, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The sequence that tile `item` is one of: those of s begin at query_start[s] * GROUP // ROWS + s."""
    low = item * 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) * GROUP // ROWS + middle <= item:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def attend_rows(
    item, head, sequences, q, q_stride, out, out_stride, arrays, block_tables, table_stride, inner, factor,
    SHAPE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, SHORT_QUERIES: tl.constexpr,
):  # fmt: skip
    """Tile `item` of the rows of all sequences; nothing where it is one of a short sequence's, or of none's."""
    sequence = sequence_of(arrays.query_start, sequences, item, SHAPE.group, ROWS)
    query_begin = tl.load(arrays.query_start + sequence)
    query_end = tl.load(arrays.query_start + sequence + 1)
    count = query_end - query_begin
    begin_row = (item - query_begin * SHAPE.group // ROWS - sequence) * ROWS
    if (count > SHORT_QUERIES) & (begin_row < count * SHAPE.group):
        seq_len = tl.load(arrays.seq_lens + sequence)
        known = known_tokens(arrays, query_begin, query_end, seq_len, SHAPE)
        flat = begin_row + tl.arange(0, ROWS)
        keep = flat < count * SHAPE.group
        queries = tl.minimum(flat // SHAPE.group, count - 1)
        rows = query_begin + queries
        heads = head * SHAPE.group + flat % SHAPE.group
        places = seq_len - count + queries
        lowest = seq_len - count + begin_row // SHAPE.group
        end = seq_len - count + tl.minimum((begin_row + ROWS - 1) // SHAPE.group, count - 1) + 1
        x = load_queries(q, q_stride, rows, heads, keep, SHAPE)
        table = block_tables + sequence.to(tl.int64) * table_stride
        state = nothing_yet(ROWS, SHAPE)
        # A draft's position is at least `known`, whatever its place is.
        begin = first_seen(tl.minimum(lowest, known), SHAPE)
        if SHAPE.window > 0:
            # Tiles that the window's edge goes through: up to the first that the last row sees all of.
            edge = begin + tl.cdiv(tl.maximum(end - SHAPE.window - begin, 0), TILE) * TILE
            edge = tl.minimum(edge, end)
            state = walk(
                state, x, begin, edge, arrays, table, head, rows, places, known, query_end, seq_len, inner, factor,
                SHAPE, TILE, STAGES, True,
            )  # fmt: skip
            begin = edge
        # Then those that all rows see, without masks; then those that the diagonal goes through, and drafts.
        whole = begin + tl.maximum(tl.minimum(lowest + 1, known) - begin, 0) // TILE * TILE
        state = walk(
            state, x, begin, whole, arrays, table, head, rows, places, known, query_end, seq_len, inner, factor,
            SHAPE, TILE, STAGES, False,
        )  # fmt: skip
        _, total, mixed = walk(
            state, x, whole, end, arrays, table, head, rows, places, known, query_end, seq_len, inner, factor,
            SHAPE, TILE, STAGES, True,
        )  # fmt: skip
        store_result(out, out_stride, mixed, total, rows, heads, keep, SHAPE)
