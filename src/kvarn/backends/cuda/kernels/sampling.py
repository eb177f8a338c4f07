"""Tokens from rows of logits, without sorting them and without looking at them on the host.

What top_k and top_p keep of a row is all weights above a threshold, and of those that equal it the first few. The
threshold is searched for: a pass over the row counts (or sums) what lies above each of several pivots, and keeps the
interval between the two that enclose it, as in the sorting-free sampling of FlashInfer (Ye et al. 2025, section 3.4,
its dual pivots), but until nothing is left to find out, rather than until a drawn token is accepted: a token is then
drawn by one random number, the same that `kvarn.sampling` draws it by. Weights are float32, of which the bits of
non-negative ones are in the order of their values: pivots are equally many representable numbers apart.

One program takes one row. The row is read from the second-level cache in all passes but the first. The size of the
vocabulary is a constant of the compiled kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.random import philox_impl

from kvarn.backends.row_rules import NOT_FINITE, NOTHING_LEFT, WORDS

_WORDS = tl.constexpr(WORDS)
_NOTHING_LEFT = tl.constexpr(NOTHING_LEFT)
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_INFINITY = tl.constexpr(float("inf"))
_MORE_THAN_ONE = tl.constexpr(0x3F800001)
"""The bits of the least float32 above 1, which is the largest weight."""


def add_biases(logits: torch.Tensor, biases: torch.Tensor, *, block: int = 256) -> None:
    """Adds to single logits, in place.

    logits: float32[R, vocab]. biases: int32[B, 3], the words of `BIAS`, no logit twice. Raises ValueError for logits of
    another type, which would round the sums.
    """
    if logits.dtype != torch.float32:
        raise ValueError(f"biases are added to float32, not to {logits.dtype}")
    count = biases.shape[0]
    if count:
        _add_biases[(triton.cdiv(count, block),)](logits, logits.stride(0), biases, count, BLOCK=block)


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    masks: torch.Tensor,
    out: torch.Tensor,
    *,
    block: int = 2048,
    pivots: int = 8,
    num_warps: int = 16,
) -> None:
    """Chooses a token from each row: greedy ones the likeliest, others one draw by the random number of their position.

    logits: float32 or bfloat16 [R, vocab], biases added. rows: int32[R, `WORDS`], the words of `ROW`. masks:
    int32[M, ceil(vocab / 32)], those of `RowRules.masks`; not read where M is 1. out: int32[R], written: the token, the
    lowest id among equals, or `NOTHING_LEFT` or `NOT_FINITE`. Equal to what `kvarn.sampling` says up to rounding:
    weights are float32, their sums float64.
    """
    count, vocab = logits.shape
    if count:
        _sample[(count,)](
            logits, logits.stride(0), rows, masks, masks.stride(0), out,
            VOCAB=vocab, MASKED=masks.shape[0] > 1, BLOCK=block, PIVOTS=pivots, num_warps=num_warps,
        )  # fmt: skip


def feed(token_ids: torch.Tensor, previous: torch.Tensor, ids: torch.Tensor, *, block: int = 256) -> None:
    """Sets tokens to those that were sampled elsewhere on the card, in place.

    token_ids: int32[≥ T]. previous: int32[T, 1], the places in `ids`, int32, of the tokens to take; -1: it stays. In
    place of what is no token comes token 0.
    """
    count = previous.shape[0]
    _feed[(triton.cdiv(count, block),)](token_ids, previous, ids, count, BLOCK=block)


@triton.jit
def _feed(token_ids, previous, ids, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(previous + at, at < count, -1)
    token = tl.load(ids + place, place >= 0, 0)
    tl.store(token_ids + at, tl.maximum(token, 0), place >= 0)


@triton.jit
def _add_biases(logits, stride, biases, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = tl.load(biases + at * 3, inside, 0)
    token = tl.load(biases + at * 3 + 1, inside, 0)
    bias = tl.load(biases + at * 3 + 2, inside, 0).to(tl.float32, bitcast=True)
    place = logits + row.to(tl.int64) * stride + token
    tl.store(place, tl.load(place, inside, 0.0) + bias, inside)


@triton.jit
def _allowed(masks, at, VOCAB: tl.constexpr):
    words = tl.load(masks + at // 32, at < VOCAB, 0)
    return ((words >> (at % 32)) & 1) == 1


@triton.jit
def _weights(row, masks, at, VOCAB: tl.constexpr, top, temperature, min_p, MASKED: tl.constexpr):
    """exp((x - top) / temperature), 0 where the token is forbidden or too unlikely."""
    x = tl.load(row + at, at < VOCAB, -_INFINITY).to(tl.float32)
    weights = tl.exp((x - top) / temperature)
    if MASKED:
        weights = tl.where(_allowed(masks, at, VOCAB), weights, 0.0)
    return tl.where(weights >= min_p, weights, 0.0)


@triton.jit
def _likeliest(row, masks, VOCAB: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """The largest allowed logit, its lowest id, and whether the row is finite at all."""
    lane = tl.arange(0, BLOCK)
    tops = tl.full([BLOCK], -_INFINITY, tl.float32)
    ids = tl.zeros([BLOCK], tl.int32)
    wrong = tl.zeros([BLOCK], tl.int32)
    some = tl.zeros([BLOCK], tl.int32)
    for start in range(0, VOCAB, BLOCK):
        at = start + lane
        x = tl.load(row + at, at < VOCAB, -_INFINITY).to(tl.float32)
        wrong |= ((x != x) | (x == _INFINITY)).to(tl.int32)
        some |= (x > -_INFINITY).to(tl.int32)
        if MASKED:
            x = tl.where(_allowed(masks, at, VOCAB), x, -_INFINITY)
        ids = tl.where(x > tops, at, ids)
        tops = tl.where(x > tops, x, tops)
    top = tl.max(tops, 0)
    best = tl.min(tl.where(tops == top, ids, VOCAB), 0)
    return top, best, (tl.max(wrong, 0) == 0) & (tl.max(some, 0) == 1)


@triton.jit
def _measure(row, masks, VOCAB: tl.constexpr, top, temperature, min_p, low, high,
             MASKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The sum and the number of weights from `high` on, and the largest from `low` to below `high` (bits of them)."""
    lane = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    border = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCAB, BLOCK):
        weights = _weights(row, masks, start + lane, VOCAB, top, temperature, min_p, MASKED)
        bits = weights.to(tl.int32, bitcast=True)
        above = bits >= high
        mass += tl.where(above, weights, 0.0).to(tl.float64)
        count += above.to(tl.int32)
        border = tl.maximum(border, tl.where((bits >= low) & (bits < high), weights, 0.0))
    return tl.sum(mass, 0), tl.sum(count, 0), tl.max(border, 0)


@triton.jit
def _search(row, masks, VOCAB: tl.constexpr, top, temperature, min_p, low, wanted,
            BY_MASS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):  # fmt: skip
    """Bits low and high: weights from `low` on reach `wanted`, in number or by their sum, those from `high` on do not,
    and all in between are equal, or one. low: bits from which on they do. Also what those from `high` on come to."""
    lane = tl.arange(0, BLOCK)
    number = tl.arange(0, PIVOTS)
    high = low * 0 + _MORE_THAN_ONE
    within = wanted * 0 + _INFINITY  # what those from `low` on come to
    above = wanted * 0
    least = wanted * 0 + 1
    if BY_MASS:
        least = low.to(tl.float32, bitcast=True).to(tl.float64)
    # Less than two of the least weight there is in between: that is one.
    while (high - low > 1) & (within - above >= 2 * least):
        step = (high - low + PIVOTS) // (PIVOTS + 1)
        pivots = low + step * (1 + number)
        found = tl.zeros([BLOCK, PIVOTS], tl.float64)
        for start in range(0, VOCAB, BLOCK):
            weights = _weights(row, masks, start + lane, VOCAB, top, temperature, min_p, MASKED)
            bits = weights.to(tl.int32, bitcast=True)
            each = weights.to(tl.float64) if BY_MASS else (weights * 0 + 1).to(tl.float64)
            found += tl.where(bits[:, None] >= pivots[None, :], each[:, None], 0.0)
        sums = tl.sum(found, 0)
        reached = tl.sum((sums >= wanted).to(tl.int32), 0)  # sums fall from pivot to pivot
        within = tl.where(reached > 0, tl.sum(tl.where(number == reached - 1, sums, 0.0), 0), within)
        above = tl.where(reached < PIVOTS, tl.sum(tl.where(number == reached, sums, 0.0), 0), above)
        high = tl.minimum(high, low + step * (reached + 1))
        low = low + step * reached
        if BY_MASS:
            least = low.to(tl.float32, bitcast=True).to(tl.float64)
    return low, high, above


@triton.jit
def _draw(row, masks, VOCAB: tl.constexpr, top, temperature, min_p, low, high, border, few, target,
          MASKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The first kept token, by id, up to which kept weights sum to more than `target`; the last where none is.

    Kept are weights from `high` on, and the first `few` of those from `low` on, which all are `border`.
    """
    lane = tl.arange(0, BLOCK)
    start = low * 0
    begin = low * 0
    carry = target * 0
    passed = few * 0
    before = target * 0  # of the block at `begin`
    earlier = few * 0
    more = target >= 0
    while (start < VOCAB) & more:
        weights = _weights(row, masks, start + lane, VOCAB, top, temperature, min_p, MASKED)
        bits = weights.to(tl.int32, bitcast=True)
        mass = tl.sum(tl.where(bits >= high, weights, 0.0).to(tl.float64), 0)
        equal = tl.sum(((bits >= low) & (bits < high)).to(tl.int32), 0)
        mass += tl.minimum(equal, tl.maximum(few - passed, 0)).to(tl.float64) * border
        begin = tl.where(mass > 0, start, begin)
        before = tl.where(mass > 0, carry, before)
        earlier = tl.where(mass > 0, passed, earlier)
        carry += mass
        passed += equal
        start += BLOCK
        more = carry <= target
    at = begin + lane
    weights = _weights(row, masks, at, VOCAB, top, temperature, min_p, MASKED)
    bits = weights.to(tl.int32, bitcast=True)
    equal = ((bits >= low) & (bits < high)).to(tl.int32)
    kept = (bits >= high) | ((equal == 1) & (tl.cumsum(equal, 0) + earlier <= few))
    sums = tl.cumsum(tl.where(kept, weights, 0.0).to(tl.float64), 0) + before
    last = tl.max(tl.where(kept, at, -1), 0)
    return tl.minimum(tl.min(tl.where(kept & (sums > target), at, VOCAB), 0), last)


@triton.jit
def _uniform(words):
    """A uniform float64 in [0, 1): 53 bits of Philox4x32-10 at counter (position, stream, 0) under key seed."""
    key0 = tl.load(words + 4).to(tl.uint32, bitcast=True)
    key1 = tl.load(words + 5).to(tl.uint32, bitcast=True)
    place0 = tl.load(words + 6).to(tl.uint32, bitcast=True)
    place1 = tl.load(words + 7).to(tl.uint32, bitcast=True)
    stream = tl.load(words + 8).to(tl.uint32, bitcast=True)
    first, second, _, _ = philox_impl(place0, place1, stream, stream ^ stream, key0, key1)
    bits = (first.to(tl.uint64) << 32 | second.to(tl.uint64)) >> 11
    return bits.to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _sample(logits, stride, rows, masks, mask_stride, out,
            VOCAB: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    words = rows + program * _WORDS
    row = logits + program.to(tl.int64) * stride
    if MASKED:
        masks += tl.load(words + 9).to(tl.int64) * mask_stride
    temperature = tl.load(words).to(tl.float32, bitcast=True)
    top, token, finite = _likeliest(row, masks, VOCAB, MASKED, BLOCK)
    if finite & (top > -_INFINITY) & (temperature > 0):
        top_p = tl.load(words + 1).to(tl.float32, bitcast=True)
        min_p = tl.load(words + 2).to(tl.float32, bitcast=True)
        top_k = tl.load(words + 3)
        # All weights above 0 are kept.
        low = top_k * 0 + 1
        high = low
        few = top_k * 0
        mass, count, border = _measure(row, masks, VOCAB, top, temperature, min_p, low, high, MASKED, BLOCK)
        if (top_k > 0) & (top_k < count):
            low, high, above = _search(
                row, masks, VOCAB, top, temperature, min_p, low, top_k.to(tl.float64), False, MASKED, BLOCK, PIVOTS
            )
            few = top_k - above.to(tl.int32)
            mass, count, border = _measure(row, masks, VOCAB, top, temperature, min_p, low, high, MASKED, BLOCK)
            mass += few.to(tl.float64) * border
        if top_p < 1:
            wanted = mass * top_p.to(tl.float64)
            low, high, above = _search(
                row, masks, VOCAB, top, temperature, min_p, low, wanted, True, MASKED, BLOCK, PIVOTS
            )
            mass, count, border = _measure(row, masks, VOCAB, top, temperature, min_p, low, high, MASKED, BLOCK)
            few = tl.maximum(tl.ceil((wanted - above) / border).to(tl.int32), 1)
            mass = above + few.to(tl.float64) * border
        target = _uniform(words) * mass
        token = _draw(
            row, masks, VOCAB, top, temperature, min_p, low, high, border, few, target, MASKED, BLOCK
        )
    token = tl.where(top > -_INFINITY, token, _NOTHING_LEFT)
    tl.store(out + program, tl.where(finite, token, _NOT_FINITE))
