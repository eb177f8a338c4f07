"""Faults on demand, to see what becomes of an engine: an observer that lets steps and restarts fail."""

from __future__ import annotations

import signal

from kvarn.scheduler import NullObserver
from kvarn.step import SchedulerOutput


class FaultOnDemand(NullObserver):
    """Fails as many of the next steps, and of the restarts after them, as it is told to."""

    def __init__(self, error: type[BaseException] = RuntimeError) -> None:
        """error: what is raised; SystemExit ends a thread that does not see to it."""
        self.steps = 0
        self.restarts = 0
        self._error = error

    def stepped(self, _scheduled: SchedulerOutput, _times: object) -> None:
        """Raises where a step is to fail. It is computed then, but nobody is told of it."""
        if self.steps:
            self.steps -= 1
            raise self._error("a step fails because a test wants it")

    def reset(self) -> None:
        """Raises where a restart is to fail."""
        if self.restarts:
            self.restarts -= 1
            raise self._error("a restart fails because a test wants it")

    def on_signal(self, number: signal.Signals) -> None:
        """From now on each such signal to this process fails a step. In the main thread."""

        def fail(_number: int, _frame: object) -> None:
            self.steps += 1

        signal.signal(number, fail)
