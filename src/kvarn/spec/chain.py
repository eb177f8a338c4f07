"""What drafters over hidden states share: which rows of a step were kept, and which guesses are likely enough."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn.draft_tree import path
from kvarn.step import SampledToken, ScheduledSequence, SchedulerOutput

LEAST = 0.12
"""No guess is made that is expected to be right less often, with all before it: a row more costs about so much of a
step (docs/dev/perf-log.md)."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a step brought a sequence."""

    part: ScheduledSequence
    tokens: Sequence[int]
    """Sampled in order: those of the draft that were right, then one more."""
    right: Sequence[int]
    """Places in the draft of those that were right."""
    token_row: int
    """The first row of the sequence among all of the step's."""
    output_row: int
    """The row among those with logits from whose hidden state the last token came; -1: nothing was sampled."""

    def rows(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of `values`, float32[T, width], the rows of tokens that are known now, in order of position."""
        known = self.token_row + len(self.part.token_ids)
        if all(place == number for number, place in enumerate(self.right)):
            return values[self.token_row : known + len(self.right)]
        return values[[*range(self.token_row, known), *(known + place for place in self.right)]]


def kept_rows(scheduled: SchedulerOutput, sampled: Sequence[SampledToken]) -> Iterator[Kept]:
    """For each sequence of the step, in order."""
    said: dict[int, list[int]] = {}
    for token in sampled:
        said.setdefault(token.sequence_id, []).append(token.token_id)
    token_row = output_row = 0
    for part in scheduled.sequences:
        tokens = said.get(part.sequence_id, ())
        right = path(part.draft, part.parents, tokens) if part.draft else ()
        last = output_row + (right[-1] + 1 if right else 0) if tokens else -1
        yield Kept(part, tokens, right, token_row, last)
        output_row += 1 + len(part.draft) if part.sample else 0
        token_row += part.num_rows


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likeliest tokens of one level, in order: their places in the draft vocabulary, and their probabilities."""

    places: Sequence[int]
    probabilities: Sequence[float]


def candidates_of(logits: NDArray[np.float32], count: int, before: float = 1.0) -> Candidates:
    """The `count` likeliest of float32[n] logits. before: the largest probability of what may stand before them; those
    that are not likely enough with it are left out, but for the first."""
    place = int(logits.argmax())
    weights = np.exp(logits - logits[place])
    total = float(weights.sum())
    if count == 1 or not before * (total - 1) >= LEAST * total:
        return Candidates((place,), (1 / total,))
    first = np.argpartition(-weights, count - 1)[:count] if count < weights.size else np.arange(weights.size)
    first = first[np.argsort(-weights[first], kind="stable")]
    return Candidates(first.tolist(), [float(weight) / total for weight in weights[first]])


def probability_of(logits: NDArray[np.float32], place: int) -> float:
    """The probability of one token by float32[n] logits; 0 for place -1."""
    if place < 0:
        return 0.0
    return 1 / float(np.exp(logits - logits[place]).sum())


WIDTH = 4
"""Tokens that may stand in one place of a tree."""


def likely_tree(levels: Sequence[Candidates], most: int, *, chained: bool = False) -> tuple[list[int], list[int]]:
    """The tree of up to `most` guesses that are expected to bring most: of each its place in the draft vocabulary, and
    its parent among them (-1: what is known).

    levels: what may stand at each level, whatever is before it; chained: after the likeliest of all levels before it,
    so that other branches have one guess. A guess is right with the product of the probabilities along its path (Cai
    et al. 2024, section 2.3.1); the likeliest come first, none below `LEAST`.
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
        if level + 1 < len(levels) and not (chained and rank):
            heapq.heappush(heap, (negative * levels[level + 1].probabilities[0], level + 1, 0, node, -negative))
    return places, parents
