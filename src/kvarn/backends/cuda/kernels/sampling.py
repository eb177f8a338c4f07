"""Tokens from rows of logits, without sorting them and without looking at them on the host.

What top_k and top_p keep of a row is all weights above a threshold, and of those that equal it the first few. The
threshold is searched for: a pass over the row counts (or sums) what lies above each of several pivots, and keeps the
interval between the two that enclose it. So do the sorting-free kernels of FlashInfer ("Sorting-Free GPU Kernels for
LLM Sampling", 2025), with two pivots and until a drawn token is accepted; here it goes on until nothing is left to find
out, since a token is then drawn by one random number, the same that `kvarn.sampling` draws it by. Weights are float32,
of which the bits of non-negative ones are in the order of their values: pivots are equally many representable numbers
apart.

A first kernel looks at each block of each row once: its likeliest token, and the sum of its weights. Then one program
takes a row: where nothing limits what may come it has found the block to draw from, and else it passes over blocks that
lie below what it looks for, which soon are most. The size of the vocabulary is a constant of the compiled kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.random import philox_impl

from kvarn.backends.cuda.sampling_layout import SURVEYED
from kvarn.backends.row_rules import NOT_FINITE, NOTHING_LEFT, WORDS

_WORDS = tl.constexpr(WORDS)
_NOTHING_LEFT = tl.constexpr(NOTHING_LEFT)
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_INFINITY = tl.constexpr(float("inf"))
_EMPTY = tl.constexpr(-3)
_MORE_THAN_ONE = tl.constexpr(0x3F800001)
"""The bits of the least float32 above 1, which is the largest weight."""


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """What is found out of each block of each row first: of its largest logit, and the sum of its weights.

    tops: float32 [R, blocks], best: int32, sums: float64. Of no use after a call.
    """

    tops: torch.Tensor
    best: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def empty(cls, rows: int, blocks: int, device: torch.device) -> Survey:
        """Allocates it."""
        tops, best, sums = (
            torch.empty((rows, blocks), dtype=dtype, device=device)
            for dtype in (torch.float32, torch.int32, torch.float64)
        )
        return cls(tops, best, sums)


def adjust(
    logits: torch.Tensor, rows: torch.Tensor, edits: torch.Tensor, before: torch.Tensor, *, block: int = 256
) -> None:
    """Adds biases to the logits and takes penalties off them, in place (see `RowRules`).

    logits: float32[R, vocab]. rows: int32[R, `WORDS`], the words of `ROW`. edits: int32[E, 4], those of `EDIT`. before:
    int32, the tokens of the step before. Raises ValueError for logits of another type, which would round the sums.
    """
    if logits.dtype != torch.float32:
        raise ValueError(f"biases are added to float32, not to {logits.dtype}")
    if logits.shape[0]:
        _adjust[(logits.shape[0],)](logits, logits.stride(0), rows, edits, before, BLOCK=block)


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    masks: torch.Tensor,
    out: torch.Tensor,
    *,
    survey: Survey | None = None,
    block: int = SURVEYED,
    pivots: int = 8,
) -> None:
    """Chooses a token from each row: greedy ones the likeliest, others one draw by the random number of their position.

    logits: float32 or bfloat16 [R, vocab], after `adjust`. rows: int32[R, `WORDS`], the words of `ROW`. masks:
    int32[M, ceil(vocab / 32)], those of `RowRules.masks`; not read where M is 1. out: int32[R], written: the token, the
    lowest id among equals, or `NOTHING_LEFT` or `NOT_FINITE`. Equal to what `kvarn.sampling` says up to rounding:
    weights are float32, their sums float64. block: tokens that are looked at at once. survey: of ceil(vocab / block)
    blocks, overwritten; None: allocated for the call.
    """
    count, vocab = logits.shape
    if not count:
        return
    blocks, masked = triton.cdiv(vocab, block), masks.shape[0] > 1
    found = survey or Survey.empty(count, blocks, logits.device)
    given = (logits, logits.stride(0), rows, masks, masks.stride(0), found.tops, found.best, found.sums)
    _survey[(count, blocks)](*given, VOCAB=vocab, MASKED=masked, BLOCK=block, num_warps=4)
    _sample[(count,)](
        *given, out, VOCAB=vocab, MASKED=masked, BLOCK=block, BLOCKS=blocks,
        LANES=triton.next_power_of_2(blocks), PIVOTS=pivots, num_warps=16,
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
def _penalized(x, seen, count, repetition, presence, frequency):
    x = tl.where(seen > 0, tl.where(x > 0, x / repetition, x * repetition), x)
    return tl.where(count > 0, x - (frequency * count.to(tl.float32) + presence), x)


@triton.jit
def _adjust(logits, stride, rows, edits, before, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    words = rows + program * _WORDS
    row = logits + program.to(tl.int64) * stride
    repetition = tl.load(words + 10).to(tl.float32, bitcast=True)
    presence = tl.load(words + 11).to(tl.float32, bitcast=True)
    frequency = tl.load(words + 12).to(tl.float32, bitcast=True)
    edits += tl.load(words + 13).to(tl.int64) * 4
    number = tl.load(words + 14)
    pending = tl.load(words + 15)
    last = tl.load(before + pending, pending >= 0, -1)
    start = number * 0
    known = number * 0
    while start < number:
        at = start + tl.arange(0, BLOCK)
        inside = at < number
        token = tl.load(edits + at * 4, inside, 0)
        bias = tl.load(edits + at * 4 + 1, inside, 0).to(tl.float32, bitcast=True)
        again = (inside & (token == last)).to(tl.int32)
        seen = tl.load(edits + at * 4 + 2, inside, 0) + again
        count = tl.load(edits + at * 4 + 3, inside, 0) + again
        x = tl.load(row + token, inside, 0.0) + bias
        tl.store(row + token, _penalized(x, seen, count, repetition, presence, frequency), inside)
        known += tl.sum(again, 0)
        start += BLOCK
    first = (last >= 0) & (known == 0)
    x = tl.load(row + last, first, 0.0)
    one = known + 1
    tl.store(row + last, _penalized(x, one, one, repetition, presence, frequency), first)


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
def _survey(
    logits, stride, rows, masks, mask_stride, tops, best, sums,
    VOCAB: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each block of a row the largest allowed logit, the first token that has it, and the sum of the weights in
    proportion to its own. In place of a token: `NOTHING_LEFT`, `NOT_FINITE`, or `_EMPTY` where no logit is above minus
    infinity, whatever is allowed."""
    program, index = tl.program_id(0), tl.program_id(1)
    words = rows + program * _WORDS
    row = logits + program.to(tl.int64) * stride
    temperature = tl.load(words).to(tl.float32, bitcast=True)
    at = index * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(row + at, at < VOCAB, -_INFINITY).to(tl.float32)
    wrong = tl.max(((x != x) | (x == _INFINITY)).to(tl.int32), 0)
    some = tl.max((x > -_INFINITY).to(tl.int32), 0)
    if MASKED:
        masks += tl.load(words + 9).to(tl.int64) * mask_stride
        x = tl.where(_allowed(masks, at, VOCAB), x, -_INFINITY)
    top = tl.max(x, 0)
    token = tl.min(tl.where(x == top, at, VOCAB), 0)
    token = tl.where(top > -_INFINITY, token, tl.where(some == 1, _NOTHING_LEFT, _EMPTY))
    token = tl.where(wrong == 1, _NOT_FINITE, token)
    least = tl.where(top > -_INFINITY, top, 0.0)  # minus infinity less itself is no number
    weights = tl.exp((x - least) / tl.where(temperature > 0, temperature, 1.0))
    place = program * tl.num_programs(1) + index
    tl.store(tops + place, top)
    tl.store(best + place, token)
    tl.store(sums + place, tl.sum(weights.to(tl.float64), 0))


@triton.jit
def _bits_of(top_of_block, top, temperature):
    """Of the largest weight of a block."""
    return tl.exp((top_of_block - top) / temperature).to(tl.int32, bitcast=True)


@triton.jit
def _measure(
    row, masks, tops, top, temperature, min_p, low, high,
    VOCAB: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The sum and the number of weights from `high` on, and the largest from `low` to below `high` (bits of them)."""
    lane = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    border = tl.zeros([BLOCK], tl.float32)
    for index in range(BLOCKS):
        if _bits_of(tl.load(tops + index), top, temperature) >= low:
            weights = _weights(row, masks, index * BLOCK + lane, VOCAB, top, temperature, min_p, MASKED)
            bits = weights.to(tl.int32, bitcast=True)
            above = bits >= high
            mass += tl.where(above, weights, 0.0).to(tl.float64)
            count += above.to(tl.int32)
            border = tl.maximum(border, tl.where((bits >= low) & (bits < high), weights, 0.0))
    return tl.sum(mass, 0), tl.sum(count, 0), tl.max(border, 0)


@triton.jit
def _search(
    row, masks, tops, top, temperature, min_p, low, wanted,
    BY_MASS: tl.constexpr, VOCAB: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    PIVOTS: tl.constexpr,
):  # fmt: skip
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
        for index in range(BLOCKS):
            if _bits_of(tl.load(tops + index), top, temperature) >= low:
                weights = _weights(row, masks, index * BLOCK + lane, VOCAB, top, temperature, min_p, MASKED)
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
def _find_block(
    row, masks, tops, top, temperature, min_p, low, high, border, few, target,
    VOCAB: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The block in which kept weights, by id, come to more than `target`, or the last that has any; what those before
    it come to, and how many of them are at the border. Kept are weights from `high` on, and the first `few` of those
    from `low` on, which all are `border`."""
    lane = tl.arange(0, BLOCK)
    index = low * 0
    begin = low * 0
    carry = target * 0
    passed = few * 0
    before = target * 0
    earlier = few * 0
    while (index < BLOCKS) & (carry <= target):
        if _bits_of(tl.load(tops + index), top, temperature) >= low:
            weights = _weights(row, masks, index * BLOCK + lane, VOCAB, top, temperature, min_p, MASKED)
            bits = weights.to(tl.int32, bitcast=True)
            mass = tl.sum(tl.where(bits >= high, weights, 0.0).to(tl.float64), 0)
            equal = tl.sum(((bits >= low) & (bits < high)).to(tl.int32), 0)
            mass += tl.minimum(equal, tl.maximum(few - passed, 0)).to(tl.float64) * border
            begin = tl.where(mass > 0, index, begin)
            before = tl.where(mass > 0, carry, before)
            earlier = tl.where(mass > 0, passed, earlier)
            carry += mass
            passed += equal
        index += 1
    return begin, before, earlier


@triton.jit
def _draw(
    row, masks, top, temperature, min_p, low, high, few, target, index, before, earlier,
    VOCAB: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first kept token of a block up to which kept weights come to more than `target`; the last where none is."""
    at = index * BLOCK + tl.arange(0, BLOCK)
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
def _sample(
    logits, stride, rows, masks, mask_stride, tops, best, sums, out,
    VOCAB: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
    PIVOTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    words = rows + program * _WORDS
    row = logits + program.to(tl.int64) * stride
    if MASKED:
        masks += tl.load(words + 9).to(tl.int64) * mask_stride
    tops += program * BLOCKS
    block = tl.arange(0, LANES)
    block_tops = tl.load(tops + block, block < BLOCKS, -_INFINITY)
    ids = tl.load(best + program * BLOCKS + block, block < BLOCKS, _EMPTY)
    top = tl.max(block_tops, 0)
    token = tl.min(tl.where(block_tops == top, ids, VOCAB), 0)
    finite = (tl.min((ids != _NOT_FINITE).to(tl.int32), 0) == 1) & (tl.max(ids, 0) > _EMPTY)
    temperature = tl.load(words).to(tl.float32, bitcast=True)
    if finite & (top > -_INFINITY) & (temperature > 0):
        top_p = tl.load(words + 1).to(tl.float32, bitcast=True)
        min_p = tl.load(words + 2).to(tl.float32, bitcast=True)
        top_k = tl.load(words + 3)
        shares = tl.load(sums + program * BLOCKS + block, block < BLOCKS, 0.0)
        shares *= tl.exp((block_tops - top) / temperature).to(tl.float64)
        mass = tl.sum(shares, 0)
        # All weights above 0, or not below min_p, are kept.
        low = tl.maximum(min_p.to(tl.int32, bitcast=True), 1)
        high = low
        few = top_k * 0
        border = top * 0
        limited = (min_p > 0) | ((top_k > 0) & (top_k < VOCAB))
        if limited:
            mass, count, border = _measure(
                row, masks, tops, top, temperature, min_p, low, high, VOCAB, MASKED, BLOCK, BLOCKS
            )
            if (top_k > 0) & (top_k < count):
                low, high, above = _search(
                    row, masks, tops, top, temperature, min_p, low, top_k.to(tl.float64),
                    False, VOCAB, MASKED, BLOCK, BLOCKS, PIVOTS,
                )  # fmt: skip
                few = top_k - above.to(tl.int32)
                mass, count, border = _measure(
                    row, masks, tops, top, temperature, min_p, low, high, VOCAB, MASKED, BLOCK, BLOCKS
                )
                mass += few.to(tl.float64) * border
        if top_p < 1:
            limited = low > 0
            wanted = mass * top_p.to(tl.float64)
            low, high, above = _search(
                row, masks, tops, top, temperature, min_p, low, wanted,
                True, VOCAB, MASKED, BLOCK, BLOCKS, PIVOTS,
            )  # fmt: skip
            mass, count, border = _measure(
                row, masks, tops, top, temperature, min_p, low, high, VOCAB, MASKED, BLOCK, BLOCKS
            )
            few = tl.maximum(tl.ceil((wanted - above) / border).to(tl.int32), 1)
            mass = above + few.to(tl.float64) * border
        target = _uniform(words) * mass
        # The block to draw from, what those before it come to, and how many of them are at the border.
        before = tl.cumsum(shares, 0)
        index = tl.min(tl.where((before > target) & (shares > 0), block, LANES), 0)
        index = tl.minimum(index, tl.max(tl.where(shares > 0, block, 0), 0))
        carry = tl.sum(tl.where(block < index, shares, 0.0), 0)
        earlier = few * 0
        if limited:
            index, carry, earlier = _find_block(
                row, masks, tops, top, temperature, min_p, low, high, border, few, target,
                VOCAB, MASKED, BLOCK, BLOCKS,
            )  # fmt: skip
        token = _draw(
            row, masks, top, temperature, min_p, low, high, few, target, index, carry, earlier, VOCAB, MASKED, BLOCK
        )
    token = tl.where(top > -_INFINITY, token, _NOTHING_LEFT)
    tl.store(out + program, tl.where(finite, token, _NOT_FINITE))
