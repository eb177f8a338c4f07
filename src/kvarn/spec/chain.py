"""What drafters over hidden states share: which rows of a step were kept, and how far a chain of guesses goes."""

from __future__ import annotations

import heapq
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


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likeliest tokens of one level, in order: their places in the draft vocabulary, and their probabilities."""

    places: Sequence[int]
    probabilities: Sequence[float]


def candidates_of(logits: NDArray[np.float32], count: int) -> Candidates:
    """The `count` likeliest of float32[n] logits."""
    if count == 1:
        place, probability = likeliest(logits)
        return Candidates((place,), (probability,))
    weights = np.exp(logits - logits.max())
    first = np.argpartition(-weights, count - 1)[:count] if count < weights.size else np.arange(weights.size)
    first = first[np.argsort(-weights[first], kind="stable")]
    total = float(weights.sum())
    return Candidates(first.tolist(), [float(weight) / total for weight in weights[first]])


def likely_tree(levels: Sequence[Candidates], most: int) -> tuple[list[int], list[int]]:
    """The tree of up to `most` guesses that are expected to bring most: of each its place in the draft vocabulary, and
    its parent among them (-1: what is known).

    levels: what may stand at each level, whatever is before it. A guess is right with the product of the probabilities
    along its path (Cai et al. 2024, section 2.3.1); the likeliest come first, none below `LEAST`.
    """
    places: list[int] = []
    parents: list[int] = []
    heap = [(-levels[0].probabilities[0], 0, 0, -1, 1.0)] if levels else []
    while heap and len(places) < most:
        negative, level, rank, parent, before = heapq.heappop(heap)
        if not -negative >= LEAST:
            break
        here = levels[level]
        node = len(places)
        places.append(here.places[rank])
        parents.append(parent)
        if rank + 1 < len(here.places):
            heapq.heappush(heap, (-before * here.probabilities[rank + 1], level, rank + 1, parent, before))
        if level + 1 < len(levels):
            heapq.heappush(heap, (negative * levels[level + 1].probabilities[0], level + 1, 0, node, -negative))
    return places, parents
