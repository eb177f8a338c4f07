"""What a tile of query rows makes of a stretch of keys: the inner loop that prefill and decode share.

FlashAttention-2 (Dao 2023, algorithm 1): an online softmax in float32 over tiles of keys, in powers of two, the sum
divided by at the end. Keys come from a paged cache, through a sequence's block table.

A row is one query head of one token; all query heads of a KV head are rows of one tile (grouped heads, Ainslie et al.
2023), so that keys and values are read once for all of them. The place of a token is its index among its sequence's
slots: its position, but for drafts of a tree.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """From exp2: Triton's interpreter has no tanh. 0 and 1 at the ends, where exp2 leaves the range."""
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
def on_path(rows, key_rows, parents, first_draft, depth):
    """bool [M, TILE]: whether a key's row is the row itself or an ancestor of it, among drafts.

    rows: int32[M]; those before first_draft see no draft. depth: the longest path. parents: see `InputBatch`.
    """
    visible = (rows[:, None] == key_rows[None, :]) & (rows >= first_draft)[:, None]
    at = rows
    for _ in range(1, depth):
        at = tl.load(parents + at, mask=at >= first_draft, other=-1)
        visible = visible | ((at[:, None] == key_rows[None, :]) & (at >= first_draft)[:, None])
    return visible


@triton.jit
def walk(
    q, peak, total, mixed,
    begin, end,
    places, rows, known, query_end, seq_len, depth,
    keys, values, key_scales, value_scales, table, head, parents, positions,
    inner, factor,
    KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TREE: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Carries the online softmax of rows on over the keys at places begin … end - 1; returns its new state.

    q [M, BLOCK_KEY] in the type of products; peak, total [M] and mixed [M, BLOCK_VALUE] float32: the largest logit so
    far, in powers of two, the sum of weights, and the weighted sum of values, both relative to it. places, rows,
    int32[M]: of each query. known: tokens of the sequence that are no drafts; depth: the longest path of drafts.
    inner: what a dot product is multiplied with before the cap (with SOFTCAP); factor: what after it, log2(e) in it.
    MASKED: whether rows see but some of these keys; the range may then end within a tile. Without, all rows see all
    keys and the range is whole tiles.
    """
    operand: tl.constexpr = q.dtype
    mixing: tl.constexpr = tl.bfloat16 if SCALED and operand == tl.float16 else operand
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        at = start + tl.arange(0, TILE)
        inside = at < end
        if MASKED:
            blocks = tl.load(table + at // BLOCK_SIZE, mask=inside, other=0)
        else:
            blocks = tl.load(table + at // BLOCK_SIZE)
        vectors = (blocks.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE) * KV_HEADS + head
        k = as_operand(load_vectors(keys, vectors, inside, KEY_DIM, BLOCK_KEY, MASKED), operand)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SCALED:
            logits = logits * tl.load(key_scales + vectors, mask=inside, other=0.0)[None, :]
        if SOFTCAP:
            logits = tanh(logits * inner)
        if MASKED:
            visible = inside[None, :] & (at[None, :] <= places[:, None])
            seen = at
            if TREE:
                key_rows = query_end - seq_len + at
                visible = inside[None, :] & (at[None, :] <= tl.minimum(places, known - 1)[:, None])
                if start + TILE > known:
                    visible = visible | (
                        inside[None, :] & on_path(rows, key_rows, parents, query_end - seq_len + known, depth)
                    )
                if WINDOW:
                    seen = tl.load(positions + key_rows, mask=inside & (at >= known), other=0)
                    seen = tl.where(at >= known, seen, at)
            if WINDOW:
                if TREE:
                    own = tl.load(positions + rows)
                else:
                    own = places
                visible = visible & (seen[None, :] > (own - WINDOW)[:, None])
            logits = tl.where(visible, logits, -float("inf"))
        highest = tl.maximum(peak, tl.max(logits, axis=1) * factor)
        if MASKED:
            base = tl.where(highest == -float("inf"), 0.0, highest)  # rows that have seen no key yet
        else:
            base = highest
        weights = tl.exp2(logits * factor - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = mixed * shrink[:, None]
        if SCALED:
            weights = weights * tl.load(value_scales + vectors, mask=inside, other=0.0)[None, :]
        v = as_operand(load_vectors(values, vectors, inside, VALUE_DIM, BLOCK_VALUE, MASKED), mixing)
        mixed = tl.dot(weights.to(mixing), v, mixed, input_precision="ieee")
        peak = highest
    return peak, total, mixed
