"""Runs tasks on a program loaded on the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvarn.backends import InputBatch, KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend, CpuExecutable
from kvarn.bench.batches import BLOCK_SIZE, KV, TaskBatches
from kvarn.bench.tasks import CHUNK, Task
from kvarn.models import Model, load_model
from kvarn.weights import open_model


class Stepper:
    """A model on the CPU back-end with room for certain tasks. Owns the executable; one caller at a time."""

    def __init__(self, model: Model, backend: CpuBackend, tasks: Iterable[Task]) -> None:
        self.model = model
        self._steps = TaskBatches(model, tuple(tasks))
        limits = StepLimits(max(CHUNK, self._steps.batch), self._steps.batch, self._steps.longest)
        self.executable: CpuExecutable = backend.load(
            model.program, model.weights, KvCacheSpec(self._steps.num_blocks, BLOCK_SIZE, KV.name), limits
        )

    def seconds(self, task: Task) -> float:
        """Wall time of the task's steps. Contexts that are there from an earlier task are not made again."""
        self.prepare(task)
        started = time.perf_counter()
        for batch in self.batches(task):
            self.executable.execute(batch)
        return time.perf_counter() - started

    def prepare(self, task: Task) -> None:
        """Makes the context that the task starts from."""
        for batch in self._steps.context(task):
            self.executable.execute(batch)

    def batches(self, task: Task) -> Iterator[InputBatch]:
        """The timed steps in order."""
        return self._steps.timed(task)


@contextmanager
def open_stepper(path: Path, backend: CpuBackend, tasks: Iterable[Task]) -> Iterator[Stepper]:
    """Loads the model at `path` for these tasks and releases it afterwards."""
    with open_model(path) as files:
        stepper = Stepper(load_model(files), backend, tasks)
        try:
            yield stepper
        finally:
            stepper.executable.close()
