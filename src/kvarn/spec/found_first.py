"""Two sources of guesses: what is found costs nothing, and only where nothing is found another drafter is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kvarn.runner import Drafter, Proposal
from kvarn.step import NewSequence, SampledToken, ScheduledSequence, SchedulerOutput


class FoundFirst:
    """Guesses what a lookup finds of a sequence, and where it finds nothing long enough what another drafter computes.

    Both follow every text. The other one reads what it did not guess when it is asked next, all of it at once: while
    copies come, it is left alone, however much comes of them.
    """

    def __init__(self, lookup: Drafter, other: Drafter) -> None:
        """Both are owned. lookup: proposes no more than it is sure of, in no time."""
        self._lookup = lookup
        self._other = other
        self.buffers: Sequence[str] = tuple(dict.fromkeys((*lookup.buffers, *other.buffers)))
        self._copying: set[int] = set()
        """Sequences whose last guesses were found."""

    def add(self, sequence: NewSequence) -> None:
        """See `Drafter.add`."""
        self._lookup.add(sequence)
        self._other.add(sequence)

    def remove(self, sequence_id: int) -> None:
        """See `Drafter.remove`."""
        self._lookup.remove(sequence_id)
        self._other.remove(sequence_id)
        self._copying.discard(sequence_id)

    def prepare(self, scheduled: SchedulerOutput) -> bool:
        """See `Drafter.prepare`. Whoever is being copied is likely to go on so: nothing is read for that."""
        computed = self._lookup.prepare(scheduled)
        return self._other.prepare(scheduled.asking_nothing_of(self._copying)) or computed

    def propose(
        self,
        scheduled: SchedulerOutput,
        sampled: Sequence[SampledToken],
        values: Mapping[str, NDArray[np.float32]],
    ) -> Sequence[Proposal]:
        """See `Drafter.propose`."""
        copies = [_copying(part) for part in scheduled.sequences]
        least = {part.sequence_id: part.least_copied for part in scheduled.sequences}
        proposed = self._lookup.propose(replace(scheduled, sequences=tuple(copies)), sampled, values)
        found = [proposal for proposal in proposed if len(proposal.token_ids) >= least[proposal.sequence_id]]
        self._copying.difference_update(least)
        self._copying.update(proposal.sequence_id for proposal in found)
        return [*found, *self._other.propose(scheduled.asking_nothing_of(self._copying), sampled, values)]

    def close(self) -> None:
        """Closes both."""
        self._lookup.close()
        self._other.close()


def _copying(part: ScheduledSequence) -> ScheduledSequence:
    """The part as a drafter is asked that only copies."""
    count = part.num_copies_wanted
    return replace(part, num_drafts_wanted=count, num_nodes_wanted=count)
