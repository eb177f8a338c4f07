"""Causal attention over a paged cache for a ragged batch: prompts' chunks, decodes and drafts, in one launch.

- Long sequences of a step (`SHORT_QUERIES` rows or more) are cut by rows: FlashAttention-2 forward (Dao 2023).
- Short ones are cut by keys (FlashDecoding, Dao et al. 2023): each split leaves its sum, its largest logit and its
  weighted values, and a second kernel merges them. How many splits there are follows from the sequence's own length, so
  that a row's result does not depend on what else is in the batch, nor on how many programs share the work.

What lies before a window is not read, and causally masked tiles neither. Shapes of tiles and grids: `attention_plan`;
the inner loop: `attention_tile`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.backends.cuda.kernels.attention_plan import (
    MIN_SPLIT,
    PARTIALS,
    SHORT_QUERIES,
    AttentionPlan,
    AttentionWorkspace,
    tiles,
)
from kvarn.backends.cuda.kernels.attention_tile import walk
from kvarn.backends.cuda.kernels.kv_write import LayerKv

_TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def first_seen(place, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Where the block begins that holds the first key which the token at that place sees."""
    if WINDOW:
        return tl.maximum(place - WINDOW + 1, 0) // BLOCK_SIZE * BLOCK_SIZE
    else:
        return place * 0


@triton.jit
def split_size(keys, rows, TILE: tl.constexpr, MIN_SPLIT: tl.constexpr, PARTIALS: tl.constexpr):
    """Keys in a split of a short sequence with so many rows, of which it sees `keys`."""
    most = PARTIALS // rows
    return tl.maximum(MIN_SPLIT, tl.cdiv(tl.cdiv(keys, most), TILE) * TILE)


@triton.jit
def sequence_of(query_start, sequences, item, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The sequence that tile `item` is one of: tiles of s begin at query_start[s] * GROUP // ROWS + s."""
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
def load_queries(q, rows, heads, keep, q_stride, OPERAND: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[M, BLOCK_DIM] in the type of products; zeros where there is no row."""
    dims = tl.arange(0, BLOCK_DIM)
    pointers = q + rows.to(tl.int64)[:, None] * q_stride + (heads * DIM)[:, None] + dims[None, :]
    x = tl.load(pointers, mask=keep[:, None] & (dims < DIM)[None, :], other=0.0)
    if x.dtype == OPERAND:
        return x
    elif OPERAND == tl.float16:
        return tl.clamp(x.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(OPERAND)
    else:
        return x.to(tl.float32).to(OPERAND)


@triton.jit
def store_result(out, mixed, total, rows, heads, keep, out_stride, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """mixed / total [M, BLOCK_DIM] as the rows' results."""
    dims = tl.arange(0, BLOCK_DIM)
    pointers = out + rows.to(tl.int64)[:, None] * out_stride + (heads * DIM)[:, None] + dims[None, :]
    result = mixed / tl.where(keep, total, 1.0)[:, None]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=keep[:, None] & (dims < DIM)[None, :])


@triton.jit
def _attend_long(
    item, head, sequences, q, q_stride, out, out_stride, keys, values, key_scales, value_scales,
    query_start, seq_lens, block_tables, table_stride, tree_parents, known_lens, positions, inner, factor,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, OPERAND: tl.constexpr, STAGES: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TREE: tl.constexpr, SCALED: tl.constexpr,
    SHORT_QUERIES: tl.constexpr,
):  # fmt: skip
    """One tile of rows of a long sequence, over all keys that they see."""
    sequence = sequence_of(query_start, sequences, item, GROUP, ROWS)
    query_begin = tl.load(query_start + sequence)
    query_end = tl.load(query_start + sequence + 1)
    count = query_end - query_begin
    begin_row = (item - query_begin * GROUP // ROWS - sequence) * ROWS
    if (count > SHORT_QUERIES) & (begin_row < count * GROUP):
        seq_len = tl.load(seq_lens + sequence)
        known = seq_len
        if TREE:
            known = tl.load(known_lens + sequence)
        flat = begin_row + tl.arange(0, ROWS)
        keep = flat < count * GROUP
        rows = query_begin + tl.minimum(flat // GROUP, count - 1)
        heads = head * GROUP + flat % GROUP
        first_place = seq_len - count
        places = first_place + rows - query_begin
        lowest = first_place + begin_row // GROUP
        end = first_place + tl.minimum((begin_row + ROWS - 1) // GROUP, count - 1) + 1
        depth = known * 0
        if TREE:
            depth = tl.max(tl.load(positions + rows), axis=0) - known + 1
        x = load_queries(q, rows, heads, keep, q_stride, OPERAND, KEY_DIM, BLOCK_KEY)
        table = block_tables + sequence.to(tl.int64) * table_stride
        peak = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mixed = tl.zeros((ROWS, BLOCK_VALUE), tl.float32)
        # A draft's position is at least `known`, whatever its place is.
        begin = first_seen(tl.minimum(lowest, known), WINDOW, BLOCK_SIZE)
        if WINDOW:
            # The tiles that the window's edge goes through, up to the first that the last row sees all of.
            full = tl.cdiv(tl.maximum(end - WINDOW - begin, 0), TILE) * TILE + begin
            edge = tl.minimum(full, end)
            peak, total, mixed = walk(
                x, peak, total, mixed, begin, edge, places, rows, known, query_end, seq_len, depth,
                keys, values, key_scales, value_scales, table, head, tree_parents, positions, inner, factor,
                KV_HEADS, KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_SIZE, TILE,
                WINDOW, SOFTCAP, TREE, SCALED, True, STAGES,
            )  # fmt: skip
            begin = edge
        whole = begin + tl.maximum(tl.minimum(lowest + 1, known) - begin, 0) // TILE * TILE
        peak, total, mixed = walk(
            x, peak, total, mixed, begin, whole, places, rows, known, query_end, seq_len, depth,
            keys, values, key_scales, value_scales, table, head, tree_parents, positions, inner, factor,
            KV_HEADS, KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_SIZE, TILE,
            WINDOW, SOFTCAP, TREE, SCALED, False, STAGES,
        )  # fmt: skip
        peak, total, mixed = walk(
            x, peak, total, mixed, whole, end, places, rows, known, query_end, seq_len, depth,
            keys, values, key_scales, value_scales, table, head, tree_parents, positions, inner, factor,
            KV_HEADS, KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_SIZE, TILE,
            WINDOW, SOFTCAP, TREE, SCALED, True, STAGES,
        )  # fmt: skip
        store_result(out, mixed, total, rows, heads, keep, out_stride, VALUE_DIM, BLOCK_VALUE)


@triton.jit
def _attend_short(
    item, head, tiles, programs, q, q_stride, out, out_stride, keys, values, key_scales, value_scales,
    query_start, seq_lens, block_tables, table_stride, tree_parents, known_lens, positions, inner, factor,
    partial, stats,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, OPERAND: tl.constexpr, STAGES: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TREE: tl.constexpr, SCALED: tl.constexpr,
    SHORT_QUERIES: tl.constexpr, MIN_SPLIT: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th split of a tile of rows of a short sequence."""
    sequence = item // (tiles * programs)
    begin_row = item // programs % tiles * ROWS
    query_begin = tl.load(query_start + sequence)
    query_end = tl.load(query_start + sequence + 1)
    count = query_end - query_begin
    if (count <= SHORT_QUERIES) & (begin_row < count * GROUP):
        seq_len = tl.load(seq_lens + sequence)
        known = seq_len
        if TREE:
            known = tl.load(known_lens + sequence)
        flat = begin_row + tl.arange(0, ROWS)
        keep = flat < count * GROUP
        queries = tl.minimum(flat // GROUP, count - 1)
        rows = query_begin + queries
        heads = head * GROUP + flat % GROUP
        first_place = seq_len - count
        places = first_place + queries
        depth = known * 0
        if TREE:
            depth = tl.max(tl.load(positions + rows), axis=0) - known + 1
        x = load_queries(q, rows, heads, keep, q_stride, OPERAND, KEY_DIM, BLOCK_KEY)
        table = block_tables + sequence.to(tl.int64) * table_stride
        first = first_seen(first_place, WINDOW, BLOCK_SIZE)
        size = split_size(seq_len - first, count, TILE, MIN_SPLIT, PARTIALS)
        splits = tl.cdiv(seq_len - first, size)
        for split in range(item % programs, splits, programs):
            begin = first + split * size
            peak = tl.full((ROWS,), -float("inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            mixed = tl.zeros((ROWS, BLOCK_VALUE), tl.float32)
            peak, total, mixed = walk(
                x, peak, total, mixed, begin, tl.minimum(begin + size, seq_len),
                places, rows, known, query_end, seq_len, depth,
                keys, values, key_scales, value_scales, table, head, tree_parents, positions, inner, factor,
                KV_HEADS, KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_SIZE, TILE,
                WINDOW, SOFTCAP, TREE, SCALED, True, STAGES,
            )  # fmt: skip
            if splits == 1:
                store_result(out, mixed, total, rows, heads, keep, out_stride, VALUE_DIM, BLOCK_VALUE)
            else:
                index = (sequence.to(tl.int64) * (KV_HEADS * GROUP) + heads) * PARTIALS + split * count + queries
                dims = tl.arange(0, BLOCK_VALUE)
                tl.store(stats + index * 2, peak, mask=keep)
                tl.store(stats + index * 2 + 1, total, mask=keep)
                inside = keep[:, None] & (dims < VALUE_DIM)[None, :]
                tl.store(partial + index[:, None] * VALUE_DIM + dims[None, :], mixed, mask=inside)


@triton.jit(do_not_specialize=["sequences", "long_items", "short_tiles", "split_programs"])
def _attention_kernel(
    q, q_stride, out, out_stride, keys, values, key_scales, value_scales,
    query_start, seq_lens, block_tables, table_stride, tree_parents, known_lens, positions, inner, factor,
    partial, stats, sequences, long_items, short_tiles, split_programs,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_SIZE: tl.constexpr, OPERAND: tl.constexpr,
    LONG_ROWS: tl.constexpr, LONG_TILE: tl.constexpr, LONG_STAGES: tl.constexpr,
    SHORT_ROWS: tl.constexpr, SHORT_TILE: tl.constexpr, SHORT_STAGES: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TREE: tl.constexpr, SCALED: tl.constexpr,
    LONG: tl.constexpr, SHORT: tl.constexpr,
    SHORT_QUERIES: tl.constexpr, MIN_SPLIT: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Tiles of long sequences first, the last of a prompt, which have most to do, before the others; then splits.

    Programs of one tile and different KV heads are neighbours: their keys lie side by side in the cache.
    """
    program = tl.program_id(0)
    head = program % KV_HEADS
    item = program // KV_HEADS
    if LONG:
        if item < long_items:
            _attend_long(
                long_items - 1 - item, head, sequences, q, q_stride, out, out_stride,
                keys, values, key_scales, value_scales, query_start, seq_lens, block_tables, table_stride,
                tree_parents, known_lens, positions, inner, factor,
                KV_HEADS, GROUP, KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_SIZE,
                LONG_ROWS, LONG_TILE, OPERAND, LONG_STAGES, WINDOW, SOFTCAP, TREE, SCALED, SHORT_QUERIES,
            )  # fmt: skip
    if SHORT:
        if item >= long_items:
            _attend_short(
                item - long_items, head, short_tiles, split_programs, q, q_stride, out, out_stride,
                keys, values, key_scales, value_scales, query_start, seq_lens, block_tables, table_stride,
                tree_parents, known_lens, positions, inner, factor, partial, stats,
                KV_HEADS, GROUP, KEY_DIM, VALUE_DIM, BLOCK_KEY, BLOCK_VALUE, BLOCK_SIZE,
                SHORT_ROWS, SHORT_TILE, OPERAND, SHORT_STAGES, WINDOW, SOFTCAP, TREE, SCALED,
                SHORT_QUERIES, MIN_SPLIT, PARTIALS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["short_rows"])
def _merge_kernel(
    partial, stats, out, out_stride, query_start, seq_lens, short_rows,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr,
    SHORT_QUERIES: tl.constexpr, MIN_SPLIT: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """One row and query head of a short sequence: its splits as one result, in a fixed order."""
    sequence = tl.program_id(0) // short_rows
    query = tl.program_id(0) % short_rows
    head = tl.program_id(1)
    query_begin = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - query_begin
    if (count <= SHORT_QUERIES) & (query < count):
        seq_len = tl.load(seq_lens + sequence)
        seen = seq_len - first_seen(seq_len - count, WINDOW, BLOCK_SIZE)
        splits = tl.cdiv(seen, split_size(seen, count, TILE, MIN_SPLIT, PARTIALS))
        if splits > 1:
            split = tl.arange(0, PARTIALS)
            keep = split < splits
            index = (sequence.to(tl.int64) * HEADS + head) * PARTIALS + split * count + query
            peaks = tl.load(stats + index * 2, mask=keep, other=-float("inf"))
            totals = tl.load(stats + index * 2 + 1, mask=keep, other=0.0)
            weights = tl.exp2(peaks - tl.max(peaks, axis=0))
            dims = tl.arange(0, BLOCK_VALUE)
            inside = (dims < VALUE_DIM)[None, :]
            pointers = partial + index[:, None] * VALUE_DIM + dims[None, :]
            mixed = tl.load(pointers, mask=keep[:, None] & inside, other=0.0)
            result = tl.sum(mixed * weights[:, None], axis=0) / tl.sum(totals * weights, axis=0)
            row = (query_begin + query).to(tl.int64)
            tl.store(
                out + row * out_stride + head * VALUE_DIM + dims, result.to(out.dtype.element_ty), mask=dims < VALUE_DIM
            )


def product_type(queries: torch.dtype, stored: torch.dtype) -> torch.dtype:
    """What queries and keys are multiplied in: the cache's type where it is a float of 16 bits, so that keys need no
    conversion; float32 where either is float32; else that of the queries."""
    if torch.float32 in (queries, stored):
        return torch.float32
    return stored if stored.itemsize == 2 else queries


def attention(
    q: Tensor,
    kv: LayerKv,
    query_start: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    plan: AttentionPlan,
    workspace: AttentionWorkspace,
    *,
    block_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: Tensor,
    tree: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Attention of q [T, heads, key_dim] over the layer's cache, written to out [T, heads, value_dim].

    Heads must be contiguous within a token of q and out. query_start int32[S+1], seq_lens int32[S] and block_tables
    int32[S, blocks] (rows need not be contiguous: a KV group of [S, G, B]) are those of `InputBatch`, for the S of
    `plan`; sequences without rows are passed over, and rows of no sequence keep what `out` has. The step's own keys and
    values must have been written. tree: (tree_parents int32[T], known_lens int32[S], positions int32[T]) where rows are
    trees of drafts; known_lens: a sequence's tokens with KV that are no drafts. scale must be above 0.

    Two launches at most, no allocation and no wait: a step can be captured. The second merges splits, and is left out
    where `workspace` is empty.
    """
    tokens, heads, key_dim = q.shape
    _, kv_heads, value_dim = kv.values.shape
    group, rest = divmod(heads, kv_heads)
    if rest or kv.keys.shape[1:] != (kv_heads, key_dim) or out.shape != (tokens, heads, value_dim):
        raise ValueError(f"queries {tuple(q.shape)} and results {tuple(out.shape)} do not fit {kv_heads} KV heads")
    if q.stride()[1:] != (key_dim, 1) or out.stride()[1:] != (value_dim, 1) or scale <= 0:
        raise ValueError("heads must be contiguous within a token, and scale above 0")
    block_key, block_value = (max(16, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
    product = product_type(q.dtype, kv.keys.dtype)
    cut = tiles(max(block_key, block_value), product)
    long_items = plan.long_programs(group, cut.long_rows)
    short_tiles = plan.short_tiles(group, cut.short_rows)
    split_programs = plan.split_programs(kv_heads, short_tiles)
    items = long_items + plan.sequences * short_tiles * split_programs
    parents, known_lens, positions = tree or (query_start, query_start, query_start)
    scaled = kv.key_scales is not None
    log2e = math.log2(math.e)
    _attention_kernel[(items * kv_heads,)](
        q, q.stride(0), out, out.stride(0), kv.keys, kv.values,
        kv.key_scales if scaled else kv.keys, kv.value_scales if scaled else kv.values,
        query_start, seq_lens, block_tables, block_tables.stride(0), parents, known_lens, positions,
        scale / softcap if softcap else 1.0, (softcap or scale) * log2e, workspace.mixed, workspace.stats,
        plan.sequences, long_items, short_tiles, split_programs,
        KV_HEADS=kv_heads, GROUP=group, KEY_DIM=key_dim, VALUE_DIM=value_dim,
        BLOCK_KEY=block_key, BLOCK_VALUE=block_value, BLOCK_SIZE=block_size, OPERAND=_TRITON_TYPES[product],
        LONG_ROWS=cut.long_rows, LONG_TILE=cut.long_keys, LONG_STAGES=cut.long_stages,
        SHORT_ROWS=cut.short_rows, SHORT_TILE=cut.short_keys, SHORT_STAGES=cut.short_stages,
        WINDOW=window or 0, SOFTCAP=softcap is not None, TREE=tree is not None, SCALED=scaled,
        LONG=plan.long, SHORT=plan.short_rows > 0,
        SHORT_QUERIES=SHORT_QUERIES, MIN_SPLIT=MIN_SPLIT, PARTIALS=PARTIALS, num_warps=cut.warps,
    )  # fmt: skip
    if plan.short_rows and workspace.mixed.numel():
        _merge_kernel[(plan.sequences * plan.short_rows, heads)](
            workspace.mixed, workspace.stats, out, out.stride(0), query_start, seq_lens, plan.short_rows,
            heads, value_dim, block_value, block_size, cut.short_keys, window or 0,
            SHORT_QUERIES, MIN_SPLIT, PARTIALS, num_warps=4,
        )  # fmt: skip
