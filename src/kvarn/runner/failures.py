"""Which sequences of a step cannot go on, and what those are told who sent them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvarn.backends.row_rules import NOT_FINITE
from kvarn.step import FailedSequence, SampledToken, SchedulerOutput


def not_finite(sequence_id: int) -> FailedSequence:
    """The model says nothing that a token, a logprob or a vector could be made of."""
    message = "the model's output for this request holds NaN or infinity: it cannot go on, and others are not affected"
    return FailedSequence(sequence_id, message, "", finite=False)


def nothing_left(sequence_id: int) -> FailedSequence:
    """The rules of its request leave no token."""
    message = "allowed_token_ids, bad_words, min_tokens and the grammar together leave no token here"
    return FailedSequence(sequence_id, message, "allowed_token_ids")


def of_prompts(scheduled: SchedulerOutput, hidden: NDArray[np.float32] | None) -> list[FailedSequence]:
    """Those with a token, of which no logits are asked for, that the model has no numbers for.

    hidden: what the last layer leaves, a row for each token of the step; None: it is not known. A back-end whose cache
    is kept finite stores such a token as zeros, so that no row after it would tell.
    """
    failed: list[FailedSequence] = []
    if hidden is None:
        return failed
    begin = 0
    for part in scheduled.sequences:
        count = len(part.token_ids) - part.sample
        if count and not np.isfinite(hidden[begin : begin + count]).all():
            failed.append(not_finite(part.sequence_id))
        begin += part.num_rows
    return failed


def without_failed(
    sampled: list[SampledToken], failed: Sequence[FailedSequence]
) -> tuple[list[SampledToken], list[FailedSequence]]:
    """The tokens of sequences that go on; and the others, each once: failed before, or with a mark for a token.

    Those without numbers come first, whatever else is wrong with them: nothing of them may be kept.
    """
    found = [*failed, *(_failure(token) for token in sampled if token.token_id < 0)]
    if not found:
        return sampled, found
    lost: dict[int, FailedSequence] = {}
    for failure in sorted(found, key=lambda failure: failure.finite):
        lost.setdefault(failure.sequence_id, failure)
    return [token for token in sampled if token.sequence_id not in lost], list(lost.values())


def _failure(token: SampledToken) -> FailedSequence:
    why = not_finite if token.token_id == NOT_FINITE else nothing_left
    return why(token.sequence_id)
