"""The sampler that serves: one native call a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvarn import _native
from kvarn.request import TokenLogprob
from kvarn.sampling.base import check_ids
from kvarn.step import NewSequence, SampledToken

UINT64 = (1 << 64) - 1


class NativeSampler:
    """`Sampler` in C++. Draws what `ReferenceSampler` draws, up to rounding at the edge between two tokens."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._native = _native.Sampler()

    def add(self, sequence: NewSequence) -> None:
        """See `Sampler.add`."""
        p = sequence.sampling
        check_ids(p, self._vocab_size)
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
        )

    def remove(self, sequence_id: int) -> None:
        """See `Sampler.remove`."""
        self._native.remove(sequence_id)

    def sample(
        self, logits: NDArray[np.float32], sequence_ids: Sequence[int], positions: Sequence[int]
    ) -> list[SampledToken]:
        """See `Sampler.sample`."""
        rows = self._native.sample(logits, list(sequence_ids), list(positions))
        sampled = []
        for sequence_id, (token, details) in zip(sequence_ids, rows, strict=True):
            logprob = None
            if details is not None:
                chosen, rank, top = details
                logprob = TokenLogprob(token, chosen, rank, tuple(top))
            sampled.append(SampledToken(sequence_id, token, logprob))
        return sampled
