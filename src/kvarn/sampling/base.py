"""The seam between runner and sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import RequestError
from kvarn.request import SamplingParams
from kvarn.step import NewSequence, SampledToken


class Sampler(Protocol):
    """Chooses tokens and remembers what each sequence's penalties need. Owned by one runner; not thread-safe."""

    def add(self, sequence: NewSequence) -> None:
        """Takes a sequence in, once; preemption does not end its life here. Raises RequestError (see `check_ids`)."""
        ...

    def remove(self, sequence_id: int) -> None:
        """Forgets a sequence; unknown ones are ignored."""
        ...

    def sample(
        self, logits: NDArray[np.float32], sequence_ids: Sequence[int], positions: Sequence[int]
    ) -> list[SampledToken]:
        """One token for each row of logits (R, vocab). positions[r]: where the sampled token will stand; with the
        sequence's seed and stream it keys the random number, so that a repeated step draws the same. Raises
        ValueError naming the sequence where its logits hold NaN or infinity, or where nothing is left to choose."""
        ...


def check_ids(sampling: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError where a parameter names a token that the vocabulary does not have."""
    for field, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        for token in ids:
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"{field} names token {token}; the vocabulary has 0 to {vocab_size - 1}", field=field
                )
