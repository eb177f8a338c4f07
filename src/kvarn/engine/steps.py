"""`Steps`: takes the steps of an engine, one after the other or, where the back-end can, one ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvarn.runner import Runner
from kvarn.scheduler import Scheduler
from kvarn.step import SchedulerOutput, StepOutput


@dataclass(frozen=True, slots=True)
class TakenStep:
    """A step that is to be booked. Times are seconds of the engine's clock."""

    scheduled: SchedulerOutput
    result: StepOutput
    began: float
    """It was scheduled, or the step before was done, where that came later."""
    decided: float
    executed: float
    overlaps: bool
    """Whether its booking takes no time of its own: the next step runs meanwhile."""


@dataclass(frozen=True, slots=True)
class _Decided:
    scheduled: SchedulerOutput
    began: float
    decided: float
    submitted: bool


class Steps:
    """Schedules steps and has the runner carry them out.

    Where it takes them (`Runner.submits`), a step is submitted before the one before it is collected. So the back-end
    has the next step to do while this one's tokens are booked and the one after is scheduled. Any other step is
    executed when all before it have been booked, and nothing is scheduled until it has been.
    """

    def __init__(
        self, runner: Runner, clock: Callable[[], float], on_decided: Callable[[SchedulerOutput, float], None]
    ) -> None:
        """on_decided: told of each step that was scheduled, and when that began."""
        self._runner = runner
        self._clock = clock
        self._on_decided = on_decided
        self._next: _Decided | None = None
        """Scheduled already."""
        self._executed = 0.0
        """When the last step was."""

    @property
    def under_way(self) -> bool:
        """Whether a step is scheduled that was not taken."""
        return self._next is not None

    def take(self, scheduler: Scheduler) -> TakenStep:
        """The next step, which the scheduler must be told of (`update`) before the next call. Raises what the runner
        raises."""
        step, self._next = self._next or self._decide(scheduler), None
        if step.submitted:
            scheduler.assume(step.scheduled)
            self._next = self._decide(scheduler)
            result = self._runner.collect()
        else:
            result = self._runner.execute(step.scheduled)
        before, self._executed = self._executed, self._clock()
        began, decided = max(step.began, before), max(step.decided, before)
        return TakenStep(step.scheduled, result, began, decided, self._executed, step.submitted)

    def forget(self) -> None:
        """Drops what is under way. Raises nothing that a step would have raised."""
        self._next = None
        self._runner.discard()

    def _decide(self, scheduler: Scheduler) -> _Decided:
        began = self._clock()
        scheduled = scheduler.schedule()
        self._on_decided(scheduled, began)
        decided = self._clock()
        submitted = self._runner.submits(scheduled)
        if submitted:
            self._runner.submit(scheduled)
        return _Decided(scheduled, began, decided, submitted)
