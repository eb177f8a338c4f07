"""The definition of sampling, in NumPy float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvarn.backends.row_rules import NOT_FINITE, NOTHING_LEFT, RowRules
from kvarn.draft_tree import child
from kvarn.request import SamplingParams, TokenLogprob
from kvarn.sampling.base import (
    Draft,
    TokenMasks,
    check_drafts,
    check_guesses,
    check_ids,
    check_masks,
    forbidden_sequences,
)
from kvarn.step import NewSequence, SampledToken

Floats = NDArray[np.float64]
WORD = (1 << 32) - 1
TOKEN, DRAFT, ACCEPT, RESIDUAL = range(4)
"""What a random number is for: to draw a token; a draft's token; whether a draft is accepted; a token in its place."""


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: a counter and a key to four random words (Salmon et al. 2011, section 3.3)."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (second >> 32) ^ b ^ k0, second & WORD, (first >> 32) ^ d ^ k1, first & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return a, b, c, d


def uniform(seed: int, stream: int, position: int, use: int = TOKEN) -> float:
    """A uniform number in [0, 1) for one token: 53 bits of Philox at counter (position, stream, use) under key seed."""
    words = philox4x32((position & WORD, position >> 32 & WORD, stream, use), (seed & WORD, seed >> 32 & WORD))
    return ((words[0] << 32 | words[1]) >> 11) * 2.0**-53


def adjusted_logits(
    logits: Floats,
    p: SamplingParams,
    prompt: Sequence[int],
    output: Counter[int],
    masked: Sequence[int],
    allowed: NDArray[np.uint32] | None = None,
) -> Floats:
    """Logits after bias, masks and penalties, in that order. float64[vocab]; the input is not changed. masked: tokens
    that min_tokens and bad_words forbid here. allowed: a row of `TokenMasks`."""
    x = logits.copy()
    for token, bias in p.logit_bias.items():
        x[token] += bias
    x[list(masked)] = -np.inf
    if p.allowed_token_ids is not None:
        x[np.setdiff1d(np.arange(len(x)), p.allowed_token_ids)] = -np.inf
    if allowed is not None:
        bits = np.unpackbits(allowed.astype("<u4").view(np.uint8), bitorder="little")
        x[bits[: len(x)] == 0] = -np.inf
    seen = list(set(prompt) | set(output))
    if p.repetition_penalty != 1.0 and seen:
        x[seen] = np.where(x[seen] > 0, x[seen] / p.repetition_penalty, x[seen] * p.repetition_penalty)
    for token, count in output.items():
        x[token] -= p.frequency_penalty * count + p.presence_penalty
    return x


def distribution(x: Floats, p: SamplingParams) -> Floats:
    """Probabilities of all tokens after temperature, min_p, top_k and top_p, renormalized. float64[vocab].

    min_p keeps tokens of at least that share of the likeliest one's probability (Nguyen et al. 2024); top_k the k
    likeliest; top_p the smallest set of likeliest tokens whose probability, among those still kept, reaches p (Holtzman
    et al. 2020, eq. 2). Among equals the lower id goes first.
    """
    weights = np.exp((x - x.max()) / p.temperature)
    weights[weights < p.min_p] = 0.0
    order = np.lexsort((np.arange(len(x)), -weights))
    if p.top_k > 0:
        weights[order[p.top_k :]] = 0.0
    if p.top_p < 1.0:
        cumulative = np.cumsum(weights[order])
        last = int(np.searchsorted(cumulative, p.top_p * cumulative[-1]))
        weights[order[last + 1 :]] = 0.0
    result: Floats = weights / weights.sum()
    return result


def draw(p: Floats, u: float) -> int:
    """Inverse distribution function of probabilities, which need not sum to 1, at u in [0, 1)."""
    cumulative = np.cumsum(p)
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


def accept_or_redraw(p: Floats, q: Floats, draft: int, accept_u: float, residual_u: float) -> int:
    """The draft with probability min(1, p / q), else a token drawn from max(0, p - q). See `Sampler.verify`."""
    if accept_u * q[draft] < p[draft]:
        return draft
    residual = np.maximum(p - q, 0.0)
    # It is 0 only where p is q up to rounding.
    return draw(residual if residual.sum() > 0 else p, residual_u)


@dataclass(slots=True)
class _State:
    new: NewSequence
    output: list[int] = field(default_factory=list)

    def adjusted(self, row: Floats, allowed: NDArray[np.uint32] | None, ahead: Sequence[int] = ()) -> Floats:
        """The row's logits after the sequence's rules, had the tokens `ahead` been sampled."""
        new, output = self.new, [*self.output, *ahead]
        masked = [*_completing(forbidden_sequences(new.sampling), output)]
        if len(output) < new.sampling.min_tokens:
            masked += new.stop_token_ids
        return adjusted_logits(row, new.sampling, new.prompt_token_ids, Counter(output), masked, allowed)


def _completing(forbidden: Sequence[tuple[int, ...]], output: Sequence[int]) -> Iterator[int]:
    """The tokens that would complete one of the sequences at the end of the output."""
    for tokens in forbidden:
        if tuple(output[len(output) - len(tokens) + 1 :]) == tokens[:-1]:
            yield tokens[-1]


class ReferenceSampler:
    """`Sampler` as its rules read; for tests and as documentation."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._states: dict[int, _State] = {}

    def add(self, sequence: NewSequence) -> None:
        """See `Sampler.add`."""
        check_ids(sequence.sampling, self._vocab_size)
        self._states[sequence.sequence_id] = _State(sequence)

    def remove(self, sequence_id: int) -> None:
        """See `Sampler.remove`."""
        self._states.pop(sequence_id, None)

    def sample(
        self,
        logits: NDArray[np.float32],
        sequence_ids: Sequence[int],
        positions: Sequence[int],
        masks: TokenMasks | None = None,
    ) -> list[SampledToken]:
        """See `Sampler.sample`."""
        return self.verify(logits, sequence_ids, positions, [Draft()] * len(sequence_ids), masks)

    def verify(
        self,
        logits: NDArray[np.float32],
        sequence_ids: Sequence[int],
        positions: Sequence[int],
        drafts: Sequence[Draft],
        masks: TokenMasks | None = None,
    ) -> list[SampledToken]:
        """See `Sampler.verify`."""
        trees = check_drafts(len(logits), self._vocab_size, drafts)
        check_masks(len(logits), self._vocab_size, masks)
        allowed = [None if masks is None or m < 0 else masks.bits[m] for m in _mask_rows(masks, len(logits))]
        tokens: list[SampledToken] = []
        row = 0
        for sequence_id, position, draft, parents in zip(sequence_ids, positions, drafts, trees, strict=True):
            place, level = -1, 0
            while True:
                at = row + 1 + place
                guess = q = None
                if draft.probabilities is not None and place + 1 < len(parents):
                    guess, q = draft.token_ids[place + 1], draft.probabilities[place + 1]
                x = logits[at].astype(np.float64)
                tokens.append(self._choose(x, sequence_id, position + level, allowed[at], guess, q))
                place, level = child(draft.token_ids, parents, place, tokens[-1].token_id), level + 1
                if place < 0:
                    break
            row += 1 + len(parents)
        return tokens

    def guess(
        self,
        logits: NDArray[np.float32],
        sequence_ids: Sequence[int],
        positions: Sequence[int],
        ahead: Sequence[Sequence[int]],
        probabilities: NDArray[np.float32],
        rows: Sequence[int],
    ) -> list[int]:
        """See `Sampler.guess`."""
        check_guesses(logits, probabilities, self._vocab_size, rows)
        vocab = min(logits.shape[1], self._vocab_size)
        padded = np.full((len(logits), self._vocab_size), -np.inf)
        padded[:, :vocab] = logits[:, :vocab]
        parts = zip(padded, sequence_ids, positions, ahead, rows, strict=True)
        return [self._guess(row, self._states[s], at, before, probabilities, to) for row, s, at, before, to in parts]

    def logprobs(
        self, logits: NDArray[np.float32], token_ids: Sequence[int], counts: Sequence[int]
    ) -> list[TokenLogprob | None]:
        """See `Sampler.logprobs`."""
        rows = zip(logits.astype(np.float64), token_ids, counts, strict=True)
        return [_logprob(row, token, count) if np.isfinite(row.max()) else None for row, token, count in rows]

    def _guess(
        self,
        row: Floats,
        state: _State,
        position: int,
        ahead: Sequence[int],
        probabilities: NDArray[np.float32],
        to: int,
    ) -> int:
        p, x = state.new.sampling, state.adjusted(row, None, ahead)
        if not (np.isfinite(row.max()) and np.isfinite(x.max())):
            return -1
        if p.greedy:
            return int(x.argmax())
        q, use = distribution(x, p), TOKEN
        if to >= 0:
            probabilities[to], use = q, DRAFT
        return draw(q, uniform(state.new.seed, state.new.stream, position, use))

    def _choose(
        self,
        row: Floats,
        sequence_id: int,
        position: int,
        allowed: NDArray[np.uint32] | None,
        guess: int | None,
        q: NDArray[np.float32] | None,
    ) -> SampledToken:
        """The token for a position. q: what `guess` was drawn from; None: by the rule without a draft."""
        if sequence_id not in self._states:
            raise ValueError(f"sequence {sequence_id} was not added")
        state = self._states[sequence_id]
        new, p = state.new, state.new.sampling
        x = state.adjusted(row, allowed)
        if not np.isfinite(row.max()):
            return SampledToken(sequence_id, NOT_FINITE)
        if not np.isfinite(x.max()):
            return SampledToken(sequence_id, NOTHING_LEFT)
        if p.greedy:
            token = int(x.argmax())
        elif q is None or guess is None:
            token = draw(distribution(x, p), uniform(new.seed, new.stream, position))
        else:
            chances = (uniform(new.seed, new.stream, position, use) for use in (ACCEPT, RESIDUAL))
            token = accept_or_redraw(distribution(x, p), q.astype(np.float64), guess, *chances)
        state.output.append(token)
        return SampledToken(sequence_id, token, None if p.logprobs is None else _logprob(row, token, p.logprobs))


def _mask_rows(masks: TokenMasks | None, rows: int) -> list[int]:
    return [-1] * rows if masks is None else [int(m) for m in masks.rows]


def _logprob(row: Floats, token: int, count: int) -> TokenLogprob:
    """Log-softmax of the raw logits at the token and at the `count` likeliest."""
    logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
    order = np.lexsort((np.arange(len(row)), -row))[:count]
    top = tuple((int(i), float(logprobs[i])) for i in order)
    return TokenLogprob(token, float(logprobs[token]), int((row > row[token]).sum()) + 1, top)


def choose(logits: NDArray[np.float32], rules: RowRules, before: NDArray[np.int32] | None = None) -> NDArray[np.int32]:
    """What a back-end that samples by itself says to logits (R, vocab): int32[R], each a token, `NOTHING_LEFT` or
    `NOT_FINITE`. before: the tokens of the step before, which may be `ROW.pending`."""
    return np.array([_choose_row(*row, rules, before) for row in zip(logits, rules.rows, strict=True)], np.int32)


def _choose_row(logits: NDArray[np.float32], row: np.void, rules: RowRules, before: NDArray[np.int32] | None) -> int:
    x = logits.astype(np.float64)
    if not np.isfinite(x.max()):
        return NOT_FINITE
    edits = rules.edits[row["first_edit"] : row["first_edit"] + row["num_edits"]]
    x[edits["token"]] += edits["bias"]
    seen = edits["token"][edits["seen"] > 0].tolist()
    output = Counter(dict(zip(edits["token"].tolist(), edits["count"].tolist(), strict=True))) + Counter()
    if row["pending"] >= 0 and before is not None and before[row["pending"]] >= 0:
        output[int(before[row["pending"]])] += 1
    p = SamplingParams(
        temperature=float(row["temperature"]),
        top_p=float(row["top_p"]),
        min_p=float(row["min_p"]),
        top_k=int(row["top_k"]),
        repetition_penalty=float(row["repetition"]),
        presence_penalty=float(row["presence"]),
        frequency_penalty=float(row["frequency"]),
    )
    x = adjusted_logits(x, p, seen, output, (), rules.masks[row["mask"]])
    if not np.isfinite(x.max()):
        return NOTHING_LEFT
    if p.greedy:
        return int(x.argmax())
    return draw(distribution(x, p), uniform(int(row["seed"]), int(row["stream"]), int(row["position"])))
