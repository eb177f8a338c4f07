"""The seam between runner and drafters, who guess what comes next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvarn.step import NewSequence, SampledToken, SchedulerOutput


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """Guesses of the next tokens of one sequence.

    probabilities: float32[len(token_ids), vocab], the distribution that each was drawn from, by use 1 of the random
    numbers (see `kvarn.sampling.Draft`); None where they were not drawn, as in a tree with branches they cannot be.
    parents: of each guess the one that it follows (see `kvarn.draft_tree`); None: each follows the one before. The
    guesses are in the drafter's own order, the likeliest first: where there is no room for all the first are verified.
    copied: whether they were looked up in what is known, and not computed.
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    probabilities: NDArray[np.float32] | None = None
    parents: tuple[int, ...] | None = None
    copied: bool = False


class Drafter(Protocol):
    """Guesses. Whatever it says, outputs keep their distribution; it only pays when it is often right.

    Owned by one runner; not thread-safe.
    """

    @property
    def buffers(self) -> Sequence[str]:
        """Names of the program's buffers that `propose` wants to see, beside none. The logits cost nothing."""
        ...

    def add(self, sequence: NewSequence) -> None:
        """A sequence that will be in the next step; once, preemption does not end its life here."""
        ...

    def remove(self, sequence_id: int) -> None:
        """Forgets a sequence; unknown ones are ignored."""
        ...

    def prepare(self, scheduled: SchedulerOutput) -> bool:
        """Told of every step before the program runs, also of one that only moves blocks.

        By then the step's blocks are saved, copied and loaded. What a drafter keeps for the tokens of blocks it brings
        up to date here. Returns whether a model computed for that.
        """
        ...

    def propose(
        self,
        scheduled: SchedulerOutput,
        sampled: Sequence[SampledToken],
        values: Mapping[str, NDArray[np.float32]],
    ) -> Sequence[Proposal]:
        """Guesses for the next step, no further ahead than `num_drafts_wanted` for each scheduled sequence, and no more
        than `num_nodes_wanted`; a drafter that looks up first, up to `num_copies_wanted` that it finds.

        Called after every step that computed anything. sampled: see `StepOutput.sampled`; all of a sequence's tokens
        that are known now are its prompt's and these, from all steps. (What comes after a sequence's end is among
        them; it will be removed.) values: `buffers` by name, with a row for each token of the step, guesses after
        the known ones; logits have one for each sequence's last known token and each guess (`logits_rows`). Valid in
        this call only.
        """
        ...

    def close(self) -> None:
        """Releases what it holds. Idempotent."""
        ...


def logits_rows(scheduled: SchedulerOutput) -> dict[int, int]:
    """Of each sequence with `sample` the row of the logits of its last known token; those of its guesses follow."""
    rows: dict[int, int] = {}
    count = 0
    for part in scheduled.sequences:
        if part.sample:
            rows[part.sequence_id] = count
            count += 1 + len(part.draft)
    return rows


class BlocklessDrafter:
    """A base for drafters that keep nothing for the tokens of blocks, so that there is nothing to prepare."""

    buffers: Sequence[str] = ()

    def prepare(self, scheduled: SchedulerOutput) -> bool:
        """Nothing."""
        del scheduled
        return False

    def close(self) -> None:
        """Nothing, where nothing is held."""


class NullDrafter(BlocklessDrafter):
    """Guesses nothing."""

    def add(self, sequence: NewSequence) -> None:
        """Nothing."""

    def remove(self, sequence_id: int) -> None:
        """Nothing."""

    def propose(
        self,
        scheduled: SchedulerOutput,
        sampled: Sequence[SampledToken],
        values: Mapping[str, NDArray[np.float32]],
    ) -> Sequence[Proposal]:
        """Nothing."""
        del scheduled, sampled, values
        return ()
