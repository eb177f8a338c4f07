"""What a tile of query rows makes of a stretch of keys: the inner loop that prefill and decode share.

FlashAttention-2 (Dao 2023, algorithm 1): an online softmax in float32 over tiles of keys, in powers of two, the sum
divided by at the end. Keys come from a paged cache, through a sequence's block table.

A row is one query head of one token; all query heads of a KV head are rows of one tile (grouped heads, Ainslie et al.
2023), so that keys and values are read once for all of them. The place of a token is its index among its sequence's
slots: its position, but for drafts of a tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class Shape:
    """What a kernel is compiled for. Dimensions called block_* are powers of two that hold those of the same name."""

    kv_heads: int
    group: int
    """Query heads of a KV head."""
    key_dim: int
    value_dim: int
    block_key: int
    block_value: int
    block_size: int
    """Of the cache."""
    operand: tl.dtype
    """What queries and keys are multiplied in."""
    mixing: tl.dtype
    """What weights and values are multiplied in."""
    scaled: bool
    """Whether a vector's elements are codes, with a scale."""
    window: int
    """0: none."""
    softcap: bool
    tree: bool


class Arrays(NamedTuple):
    """A step's arrays and a layer's cache, as kernels take them. What a `Shape` has no use for may be any tensor."""

    key_cache: torch.Tensor
    value_cache: torch.Tensor
    key_scales: torch.Tensor
    value_scales: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    tree_parents: torch.Tensor
    positions: torch.Tensor


@triton.jit
def tanh(x):
    """From exp2: Triton's interpreter has no tanh. 1 and -1 at the ends, where exp2 leaves the range."""
    return 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)


@triton.jit
def as_operand(x, operand: tl.constexpr):
    """Elements as a matrix operand of that type, by way of float32: each step is one that all types have."""
    if x.dtype == operand:
        return x
    else:
        return x.to(tl.float32).to(operand)


@triton.jit
def load_vectors(cache, vectors, keep, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Vectors [TILE, BLOCK_DIM] by index. MASKED: zeros where `keep` is false; without, all of them exist."""
    dims = tl.arange(0, BLOCK_DIM)
    pointers = cache + vectors[:, None] * DIM + dims[None, :]
    if DIM == BLOCK_DIM:
        if MASKED:
            return tl.load(pointers, mask=keep[:, None], other=0.0)
        else:
            return tl.load(pointers)
    else:
        inside = (dims < DIM)[None, :]
        if MASKED:
            inside = inside & keep[:, None]
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_queries(q, q_stride, rows, heads, keep, SHAPE: tl.constexpr):
    """[M, block_key] in the type of products; zeros where there is no row."""
    operand: tl.constexpr = SHAPE.operand
    dims = tl.arange(0, SHAPE.block_key)
    pointers = q + rows.to(tl.int64)[:, None] * q_stride + (heads * SHAPE.key_dim)[:, None] + dims[None, :]
    x = tl.load(pointers, mask=keep[:, None] & (dims < SHAPE.key_dim)[None, :], other=0.0)
    if x.dtype == tl.bfloat16 and operand == tl.float16:
        x = tl.clamp(x.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return as_operand(x, operand)


@triton.jit
def store_result(out, out_stride, mixed, total, rows, heads, keep, SHAPE: tl.constexpr):
    """mixed / total [M, block_value] as the rows' results."""
    dims = tl.arange(0, SHAPE.block_value)
    pointers = out + rows.to(tl.int64)[:, None] * out_stride + (heads * SHAPE.value_dim)[:, None] + dims[None, :]
    result = mixed / tl.where(keep, total, 1.0)[:, None]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=keep[:, None] & (dims < SHAPE.value_dim)[None, :])


@triton.jit
def first_seen(place, SHAPE: tl.constexpr):
    """Where the block begins that holds the first key which the token at that place sees."""
    if SHAPE.window > 0:
        return tl.maximum(place - SHAPE.window + 1, 0) // SHAPE.block_size * SHAPE.block_size
    else:
        return place * 0


@triton.jit
def known_tokens(arrays, query_begin, query_end, seq_len, SHAPE: tl.constexpr):
    """Tokens of a sequence that are no drafts: drafts are its last rows, and have parents."""
    low = query_begin
    high = query_end
    if SHAPE.tree:
        while low < high:
            middle = (low + high) // 2
            if tl.load(arrays.tree_parents + middle) >= 0:
                high = middle
            else:
                low = middle + 1
        return seq_len - query_end + low
    else:
        return seq_len


@triton.jit
def on_path(rows, key_rows, parents, first_draft, depth):
    """bool [M, TILE]: whether a key's row is the row itself or an ancestor of it, among drafts.

    rows: int32[M]; those before first_draft see no draft. depth: the longest path. parents: see `InputBatch`.
    """
    at = rows
    visible = (at[:, None] == key_rows[None, :]) & (at >= first_draft)[:, None]
    for _ in range(1, depth):
        at = tl.load(parents + at, mask=at >= first_draft, other=-1)
        visible = visible | ((at[:, None] == key_rows[None, :]) & (at >= first_draft)[:, None])
    return visible


@triton.jit
def visible_keys(at, end, arrays, rows, places, known, query_end, seq_len, SHAPE: tl.constexpr):
    """bool [M, TILE]: whether rows see the keys at places `at` before `end`. See `walk`."""
    inside = (at < end)[None, :]
    visible = inside & (at[None, :] <= places[:, None])
    seen = at
    own = places
    if SHAPE.tree:
        own = tl.load(arrays.positions + rows)
        visible = inside & (at[None, :] <= tl.minimum(places, known - 1)[:, None])
        key_rows = query_end - seq_len + at
        if tl.max(at, axis=0) >= known:
            depth = tl.max(own, axis=0) - known + 1
            first_draft = query_end - seq_len + known
            visible = visible | (inside & on_path(rows, key_rows, arrays.tree_parents, first_draft, depth))
            draft = (at >= known) & (at < end)
            seen = tl.where(draft, tl.load(arrays.positions + key_rows, mask=draft, other=0), at)
    if SHAPE.window > 0:
        visible = visible & (seen[None, :] > (own - SHAPE.window)[:, None])
    return visible


@triton.jit
def walk(
    state, q, begin, end, arrays, table, head, rows, places, known, query_end, seq_len, inner, factor,
    SHAPE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Carries the online softmax of M rows on over the keys at places begin … end - 1; returns its new state.

    state: float32 (peak [M], total [M], mixed [M, block_value]): the largest logit so far, in powers of two, the sum of
    weights, and the weighted sum of values, both relative to it. q: [M, block_key]. rows, places, int32[M]: of each
    query. known: tokens of the sequence that are no drafts. inner: what a dot product is multiplied with before the cap
    (with a cap); factor: what after it, log2(e) in it. MASKED: whether some rows do not see some of these keys; the
    range may then end within a tile. Without, all rows see all keys, and the range is whole tiles.
    """
    peak, total, mixed = state
    mixing: tl.constexpr = SHAPE.mixing
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        at = start + tl.arange(0, TILE)
        inside = at < end
        if MASKED:
            blocks = tl.load(table + at // SHAPE.block_size, mask=inside, other=0)
        else:
            blocks = tl.load(table + at // SHAPE.block_size)
        vectors = (blocks.to(tl.int64) * SHAPE.block_size + at % SHAPE.block_size) * SHAPE.kv_heads + head
        k = as_operand(load_vectors(arrays.key_cache, vectors, inside, SHAPE.key_dim, SHAPE.block_key, MASKED), q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SHAPE.scaled:
            logits = logits * tl.load(arrays.key_scales + vectors, mask=inside, other=0.0)[None, :]
        if SHAPE.softcap:
            logits = tanh(logits * inner)
        if MASKED:
            visible = visible_keys(at, end, arrays, rows, places, known, query_end, seq_len, SHAPE)
            logits = tl.where(visible, logits, -float("inf"))
        highest = tl.maximum(peak, tl.max(logits, axis=1) * factor)
        base = highest
        if MASKED:
            base = tl.where(highest == -float("inf"), 0.0, highest)  # rows that have seen no key yet
        weights = tl.exp2(logits * factor - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = mixed * shrink[:, None]
        if SHAPE.scaled:
            weights = weights * tl.load(arrays.value_scales + vectors, mask=inside, other=0.0)[None, :]
        found = load_vectors(arrays.value_cache, vectors, inside, SHAPE.value_dim, SHAPE.block_value, MASKED)
        v = as_operand(found, mixing)
        mixed = tl.dot(weights.to(mixing), v, mixed, input_precision="ieee")
        peak = highest
    return peak, total, mixed


@triton.jit
def nothing_yet(ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """The state of rows that have seen no key."""
    block: tl.constexpr = SHAPE.block_value
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    return peak, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, block), tl.float32)
