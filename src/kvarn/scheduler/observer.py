"""`Observer`: told what is decided and done, as it happens. The null object does nothing, so nobody asks whether."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from kvarn.scheduler.sequence import Sequence
from kvarn.step import SchedulerOutput


class Hold(StrEnum):
    """Why the first of the waiting sequences was not admitted to a step."""

    SEATS = "seats"
    """max_num_seqs sequences run."""
    BUDGET = "budget"
    """The step's tokens are given out."""
    BLOCKS = "blocks"
    """Too few blocks of KV cache are free."""
    REPEATS = "repeats"
    """Another computes in this step what it would; it waits to find it."""
    LOADING = "loading"
    """Blocks of the second tier are loaded for it in this step."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When the parts of a step ended, in seconds of the engine's clock."""

    began: float
    decided: float
    """The scheduler's part."""
    executed: float
    """The runner's."""
    ended: float
    """Booking, detokenizing."""


class Observer(Protocol):
    """Called in the engine's thread. Must return soon, raise nothing and change nothing of what it is told of."""

    def queued(self, sequence: Sequence) -> None:
        """A sequence came in."""
        ...

    def admitted(self, sequence: Sequence) -> None:
        """A waiting sequence takes part from this step on; its first `num_computed_tokens` are in the cache."""
        ...

    def held(self, sequence: Sequence, reason: Hold) -> None:
        """The first waiting sequence stays out of this step."""
        ...

    def preempted(self, sequence: Sequence) -> None:
        """A sequence gives its blocks up and waits; `num_computed_tokens` are still those it had."""
        ...

    def found(self, sequence: Sequence, num_tokens: int) -> None:
        """A sequence that takes part need not compute so many tokens more: another has, meanwhile."""
        ...

    def loaded(self, sequence: Sequence, num_tokens: int) -> None:
        """So many tokens of a waiting sequence were read from the second tier."""
        ...

    def evicted(self, num_blocks: int) -> None:
        """Cached blocks that no sequence held were let go."""
        ...

    def ended(self, sequence: Sequence) -> None:
        """A sequence ended; `finish_reason` says why."""
        ...

    def stepped(self, scheduled: SchedulerOutput, times: StepTimes) -> None:
        """A step is done."""
        ...

    def reset(self) -> None:
        """A step failed: all sequences are lost, and nobody tells of their end. Ids and steps are numbered anew."""
        ...


class NullObserver:
    """Sees nothing."""

    def queued(self, sequence: Sequence) -> None:
        """Nothing."""

    def admitted(self, sequence: Sequence) -> None:
        """Nothing."""

    def held(self, sequence: Sequence, reason: Hold) -> None:
        """Nothing."""

    def preempted(self, sequence: Sequence) -> None:
        """Nothing."""

    def found(self, sequence: Sequence, num_tokens: int) -> None:
        """Nothing."""

    def loaded(self, sequence: Sequence, num_tokens: int) -> None:
        """Nothing."""

    def evicted(self, num_blocks: int) -> None:
        """Nothing."""

    def ended(self, sequence: Sequence) -> None:
        """Nothing."""

    def stepped(self, scheduled: SchedulerOutput, times: StepTimes) -> None:
        """Nothing."""

    def reset(self) -> None:
        """Nothing."""
