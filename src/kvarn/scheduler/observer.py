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

    def evicted(self, num_blocks: int) -> None:
        """Cached blocks that no sequence held were let go."""
        ...

    def ended(self, sequence: Sequence) -> None:
        """A sequence ended; `finish_reason` says why."""
        ...

    def stepped(self, scheduled: SchedulerOutput, times: StepTimes) -> None:
        """A step is done."""
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

    def evicted(self, num_blocks: int) -> None:
        """Nothing."""

    def ended(self, sequence: Sequence) -> None:
        """Nothing."""

    def stepped(self, scheduled: SchedulerOutput, times: StepTimes) -> None:
        """Nothing."""
