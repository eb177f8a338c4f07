"""What the scheduler keeps while it puts a step together, and of each request until its sequences have ended."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kvarn.scheduler.budget import StepBudget
from kvarn.scheduler.observer import Hold
from kvarn.scheduler.sequence import Sequence
from kvarn.step import NewSequence, ScheduledSequence


@dataclass(slots=True)
class Group:
    """The unfinished sequences of a request. `forks` wait until the first has computed the prompt they share."""

    sequences: dict[int, Sequence]
    forks: list[Sequence]
    started: bool = False

    def release_forks(self) -> list[Sequence]:
        """Those that waited and have not ended; none waits any more."""
        released, self.forks = [fork for fork in self.forks if not fork.finished], []
        return released


@dataclass(slots=True)
class StepAssembly:
    """A step while it is put together."""

    budget: StepBudget
    pending: deque[Sequence]
    """Running sequences that have no tokens of the step yet, in the policy's order."""
    sequences: list[ScheduledSequence] = field(default_factory=list)
    new: list[NewSequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    prompt_rows: int = 0
    """Rows of logits for prompts, beside the one that every sequence has."""
    held: tuple[Sequence, Hold] | None = None
    """The first of those that wait, and why it was not admitted."""
