"""The sampler that serves: one native call a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvarn import _native
from kvarn.request import TokenLogprob
from kvarn.sampling.base import (
    Draft,
    TokenMasks,
    allowed_mask,
    check_drafts,
    check_guesses,
    check_ids,
    check_masks,
    forbidden_sequences,
)
from kvarn.step import NewSequence, SampledToken

UINT64 = (1 << 64) - 1


class NativeSampler:
    """`Sampler` in C++. Draws what `ReferenceSampler` draws, up to rounding at the edge between two tokens."""

    def __init__(self, vocab_size: int, pool: Callable[[], _native.Pool | None] = lambda: None) -> None:
        """pool: asked in each call whose threads share the rows, and must be idle; None: the caller's does all."""
        self._vocab_size = vocab_size
        self._pool = pool
        self._native = _native.Sampler()

    def add(self, sequence: NewSequence) -> None:
        """See `Sampler.add`."""
        p = sequence.sampling
        check_ids(p, self._vocab_size)
        allowed = allowed_mask(p, self._vocab_size)
        self._native.add(
            sequence=sequence.sequence_id,
            prompt=list(sequence.prompt_token_ids) if p.repetition_penalty != 1.0 else [],
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            repetition_penalty=p.repetition_penalty,
            presence_penalty=p.presence_penalty,
            frequency_penalty=p.frequency_penalty,
            min_tokens=p.min_tokens,
            logprobs=-1 if p.logprobs is None else p.logprobs,
            seed=sequence.seed & UINT64,
            stream=sequence.stream,
            bias=list(p.logit_bias.items()),
            stop_tokens=list(sequence.stop_token_ids),
            allowed=[] if allowed is None else allowed.tolist(),
            forbidden=[list(word) for word in forbidden_sequences(p) if len(word) > 1],
        )

    def remove(self, sequence_id: int) -> None:
        """See `Sampler.remove`."""
        self._native.remove(sequence_id)

    def sample(
        self,
        logits: NDArray[np.float32],
        sequence_ids: Sequence[int],
        positions: Sequence[int],
        masks: TokenMasks | None = None,
    ) -> list[SampledToken]:
        """See `Sampler.sample`."""
        if masks is not None:
            return self.verify(logits, sequence_ids, positions, [Draft()] * len(sequence_ids), masks)
        rows = self._native.sample(logits, list(sequence_ids), list(positions), self._pool())
        return [
            SampledToken(sequence_id, row[0]) if row[1] is None else _token(sequence_id, row)
            for sequence_id, row in zip(sequence_ids, rows, strict=True)
        ]

    def verify(
        self,
        logits: NDArray[np.float32],
        sequence_ids: Sequence[int],
        positions: Sequence[int],
        drafts: Sequence[Draft],
        masks: TokenMasks | None = None,
    ) -> list[SampledToken]:
        """See `Sampler.verify`."""
        parents = check_drafts(len(logits), self._vocab_size, drafts)
        check_masks(len(logits), self._vocab_size, masks)
        bits, rows = (None, None) if masks is None else (np.ascontiguousarray(masks.bits), masks.rows.tolist())
        found = self._native.verify(
            logits,
            list(sequence_ids),
            list(positions),
            [list(draft.token_ids) for draft in drafts],
            [list(tree) for tree in parents],
            [None if d.probabilities is None else np.ascontiguousarray(d.probabilities, np.float32) for d in drafts],
            bits,
            rows,
            self._pool(),
        )
        return [_token(sequence_ids[place], row) for place, row in found]

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
        tokens: list[int] = self._native.guess(
            logits, vocab, list(sequence_ids), list(positions), [list(before) for before in ahead], probabilities,
            list(rows), self._pool(),
        )  # fmt: skip
        return tokens

    def logprobs(
        self, logits: NDArray[np.float32], token_ids: Sequence[int], counts: Sequence[int]
    ) -> list[TokenLogprob | None]:
        """See `Sampler.logprobs`."""
        found = self._native.logprobs(np.ascontiguousarray(logits), list(token_ids), list(counts), self._pool())
        return [_token(-1, row).logprob for row in found]


def _token(sequence_id: int, row: tuple[int, tuple[float, int, list[tuple[int, float]]] | None]) -> SampledToken:
    """What the native sampler says of one token."""
    token, details = row
    if details is None:
        return SampledToken(sequence_id, token)
    logprob, rank, top = details
    return SampledToken(sequence_id, token, TokenLogprob(token, logprob, rank, tuple(top)))
