"""Causal attention over a paged cache for a ragged batch: prompts' chunks, decodes and drafts, in one launch.

Sequences with many rows in a step are cut by rows (`attention_rows`), those with few by keys (`attention_splits`). What
lies before a window is not read, nor are tiles that the causal mask covers. Shapes of tiles and grids:
`attention_plan`; the inner loop: `attention_tile`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.backends.cuda.kernels.attention_plan import (
    MIN_SPLIT,
    PARTIALS,
    SHORT_QUERIES,
    AttentionPlan,
    tiles,
    workspace_elements,
)
from kvarn.backends.cuda.kernels.attention_rows import attend_rows
from kvarn.backends.cuda.kernels.attention_splits import attend_splits, merge_kernel
from kvarn.backends.cuda.kernels.attention_tile import Arrays, Shape
from kvarn.backends.cuda.kernels.kv_write import LayerKv

_TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True, eq=False)
class AttentionWorkspace:
    """Partial results of splits. One serves all layers: what is in it is of no use after a call.

    mixed: float32, room for [sequences, heads, PARTIALS, value_dim]; stats: for [sequences, heads, PARTIALS, 2].
    """

    mixed: Tensor
    stats: Tensor

    @classmethod
    def empty(
        cls, sequences: int, heads: int, value_dim: int, max_model_len: int, device: torch.device | str
    ) -> AttentionWorkspace:
        """Allocates it, 4 bytes for each of `workspace_elements`."""
        sizes = workspace_elements(sequences, heads, value_dim, max_model_len)
        mixed, stats = (torch.empty(size, dtype=torch.float32, device=device) for size in sizes)
        return cls(mixed, stats)


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
    out: Tensor,
    window: int | None = None,
    softcap: float | None = None,
    tree: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Attention of q [T, heads, key_dim] over the layer's cache, written to out [T, heads, value_dim].

    Heads must be contiguous within a token of q and of out. query_start int32[S+1], seq_lens int32[S] and block_tables
    int32[S, blocks] (rows need not be contiguous: a KV group of [S, G, B]) are those of `InputBatch`, for the S of
    `plan`. Sequences without rows are passed over, and rows of no sequence keep what `out` has. The step's own keys and
    values must have been written. tree: (tree_parents int32[T], positions int32[T]) where drafts are trees. scale must
    be above 0. Raises ValueError where shapes do not fit.

    Two launches at most, no allocation and no wait, so that a step can be captured. The second merges splits, and is
    left out where `workspace` is empty: then no sequence may have more than `MIN_SPLIT` tokens.
    """
    tokens, heads, key_dim = q.shape
    _, kv_heads, value_dim = kv.values.shape
    if heads % kv_heads or kv.keys.shape[1:] != (kv_heads, key_dim) or out.shape != (tokens, heads, value_dim):
        raise ValueError(f"queries {tuple(q.shape)} and results {tuple(out.shape)} do not fit {kv_heads} KV heads")
    if q.stride()[1:] != (key_dim, 1) or out.stride()[1:] != (value_dim, 1) or scale <= 0:
        raise ValueError("heads must be contiguous within a token, and scale above 0")
    shape = _shape(q, kv, block_size, window, softcap is not None, tree is not None)
    cut = tiles(max(shape.block_key, shape.block_value), float32=shape.operand == tl.float32)
    long_items = plan.long_items(shape.group, cut.long_rows)
    short_tiles = plan.short_tiles(shape.group, cut.short_rows)
    split_programs = plan.split_programs(kv_heads, short_tiles)
    items = long_items + plan.sequences * short_tiles * split_programs
    parents, positions = tree or (query_start, query_start)
    key_scales = kv.keys if kv.key_scales is None else kv.key_scales
    value_scales = kv.values if kv.value_scales is None else kv.value_scales
    arrays = Arrays(kv.keys, kv.values, key_scales, value_scales, query_start, seq_lens, parents, positions)
    _attention_kernel[(items * kv_heads,)](
        q, q.stride(0), out, out.stride(0), arrays, block_tables, block_tables.stride(0),
        scale / softcap if softcap else 1.0, (softcap or scale) * math.log2(math.e), workspace.mixed, workspace.stats,
        plan.sequences, long_items, short_tiles, split_programs, SHAPE=shape, TILES=cut, LONG=plan.long,
        SHORT_QUERIES=SHORT_QUERIES, MIN_SPLIT=MIN_SPLIT, PARTIALS=PARTIALS, num_warps=cut.warps,
        maxnreg=None if plan.long else cut.short_registers,
    )  # fmt: skip
    if workspace.mixed.numel():
        merge_kernel[(plan.sequences * plan.short_rows, heads)](
            workspace.mixed, workspace.stats, out, out.stride(0), query_start, seq_lens, plan.short_rows,
            SHAPE=shape, TILE=cut.short_keys,
            SHORT_QUERIES=SHORT_QUERIES, MIN_SPLIT=MIN_SPLIT, PARTIALS=PARTIALS, num_warps=4,
        )  # fmt: skip


def _shape(q: Tensor, kv: LayerKv, block_size: int, window: int | None, softcap: bool, tree: bool) -> Shape:
    kv_heads, key_dim = kv.keys.shape[1:]
    value_dim = kv.values.shape[2]
    block_key, block_value = (max(16, triton.next_power_of_2(dim)) for dim in (key_dim, value_dim))
    operand = _product_type(q.dtype, kv.keys.dtype)
    scaled = kv.key_scales is not None
    # A weight times a small scale would leave float16's range.
    mixing = tl.bfloat16 if scaled and operand == torch.float16 else _TRITON_TYPES[operand]
    return Shape(
        kv_heads, q.shape[1] // kv_heads, key_dim, value_dim, block_key, block_value, block_size,
        _TRITON_TYPES[operand], mixing, scaled, window or 0, softcap, tree,
    )  # fmt: skip


def _product_type(queries: torch.dtype, stored: torch.dtype) -> torch.dtype:
    """What queries and keys are multiplied in: the cache's type where it is a float of 16 bits, so that keys need no
    conversion; float32 where either is float32; else that of the queries."""
    if torch.float32 in (queries, stored):
        return torch.float32
    return stored if stored.itemsize == 2 else queries


# Block tables have another address and width in each step: nothing is to be compiled anew for that.
@triton.jit(
    do_not_specialize=["block_tables", "table_stride", "sequences", "long_items", "short_tiles", "split_programs"]
)
def _attention_kernel(
    q, q_stride, out, out_stride, arrays, block_tables, table_stride, inner, factor, partial, stats,
    sequences, long_items, short_tiles, split_programs,
    SHAPE: tl.constexpr, TILES: tl.constexpr, LONG: tl.constexpr,
    SHORT_QUERIES: tl.constexpr, MIN_SPLIT: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Tiles of long sequences first, the last ones of a prompt, which have most to do, before others; then splits.

    Programs of one tile and different KV heads are neighbours: their keys lie side by side in the cache.
    """
    program = tl.program_id(0)
    head = program % SHAPE.kv_heads
    item = program // SHAPE.kv_heads
    if LONG:
        if item < long_items:
            attend_rows(
                long_items - 1 - item, head, sequences, q, q_stride, out, out_stride, arrays, block_tables,
                table_stride, inner, factor, SHAPE, TILES.long_rows, TILES.long_keys, TILES.long_stages, SHORT_QUERIES,
            )  # fmt: skip
    if item >= long_items:
        attend_splits(
            item - long_items, head, short_tiles, split_programs, q, q_stride, out, out_stride, arrays,
            block_tables, table_stride, inner, factor, partial, stats,
            SHAPE, TILES.short_rows, TILES.short_keys, TILES.short_stages, SHORT_QUERIES, MIN_SPLIT, PARTIALS,
        )  # fmt: skip
