"""What drafters over hidden states share: which rows of a step were kept, and how far a chain of guesses goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn.step import SampledToken, ScheduledSequence, SchedulerOutput

LEAST = 0.12
"""A chain ends before a guess that is expected to be right less often, with all before it: a row more costs about so
much of a step (docs/dev/perf-log.md)."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a step brought a sequence that sampled in it."""

    part: ScheduledSequence
    tokens: tuple[int, ...]
    """Sampled in order: those of the draft that were right, then one more."""
    token_row: int
    """The row among all of the step's from whose hidden state the last of them came."""
    output_row: int
    """The same among the rows with logits."""


def kept_rows(scheduled: SchedulerOutput, sampled: Sequence[SampledToken]) -> Iterator[Kept]:
    """For each sequence with `sample` in schedule order."""
    said: dict[int, list[int]] = {}
    for token in sampled:
        said.setdefault(token.sequence_id, []).append(token.token_id)
    token_row = output_row = 0
    for part in scheduled.sequences:
        if part.sample:
            tokens = said[part.sequence_id]
            right = len(tokens) - 1
            yield Kept(part, tuple(tokens), token_row + len(part.token_ids) - 1 + right, output_row + right)
            output_row += 1 + len(part.draft)
        token_row += part.num_rows


def likeliest(logits: NDArray[np.float32]) -> tuple[int, float]:
    """The largest of float32[n] logits: its index, and its probability."""
    place = int(logits.argmax())
    return place, float(1.0 / np.exp(logits - logits[place]).sum())


def chain_of(logits: Iterable[NDArray[np.float32]]) -> list[int]:
    """The likeliest token of each guess's logits, as long as the product of their probabilities is at least `LEAST`."""
    chain: list[int] = []
    together = 1.0
    for row in logits:
        place, probability = likeliest(row)
        together *= probability
        if not together >= LEAST:
            break
        chain.append(place)
    return chain
