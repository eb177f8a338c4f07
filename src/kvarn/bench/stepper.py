"""Runs tasks on a loaded program."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kvarn.backends import InputBatch, KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend, CpuExecutable
from kvarn.bench.tasks import CHUNK, Task, chunks
from kvarn.kv_types import KV_TYPES
from kvarn.models import Model, load_model
from kvarn.weights import open_model

BLOCK_SIZE = 16
KV = KV_TYPES["float16"]


class Stepper:
    """A model on the CPU back-end with room for certain tasks. Owns the executable; one caller at a time."""

    def __init__(self, model: Model, backend: CpuBackend, tasks: Iterable[Task]) -> None:
        every = list(tasks)
        self.model = model
        self._shallow = max((_cache_tokens(task) for task in every if not task.depth), default=0)
        deep = max((_cache_tokens(task) for task in every if task.depth), default=0)
        batch = max(task.batch for task in every)
        limits = StepLimits(max(CHUNK, batch), batch, max(task.depth + task.tokens for task in every))
        self._num_groups = len(model.program.kv_groups)
        blocks = (self._shallow + deep) // BLOCK_SIZE * self._num_groups
        self.executable: CpuExecutable = backend.load(
            model.program, model.weights, KvCacheSpec(blocks, BLOCK_SIZE, KV.name), limits
        )
        self._deep: tuple[int, int] | None = None
        """Depth and slots of a sequence of the contexts that the cache holds."""

    def seconds(self, task: Task) -> float:
        """Wall time of the task's steps. Contexts that are there from an earlier task are not made again."""
        self.prepare(task)
        started = time.perf_counter()
        for batch in self.batches(task):
            self.executable.execute(batch)
        return time.perf_counter() - started

    def prepare(self, task: Task) -> None:
        """Makes the context that the task starts from."""
        made = (task.depth, _sequence_tokens(task))
        if not task.depth or self._deep == made:
            return
        for sequence in range(task.batch):
            for start, end in chunks(task.depth):
                self.executable.execute(self._prompt(task, start, end, wanted=False, sequence=sequence))
        self._deep = made if task.batch == 1 else None

    def batches(self, task: Task) -> Iterator[InputBatch]:
        """The timed steps in order."""
        if task.op == "prefill":
            for start, end in chunks(task.tokens):
                yield self._prompt(task, start, end, wanted=end == task.tokens)
            return
        for step in range(task.tokens):
            tokens = [[31 * sequence + 7 * step] for sequence in range(task.batch)]
            yield self._batch(task, tokens, task.depth + step, True, 0)

    def _prompt(self, task: Task, start: int, end: int, *, wanted: bool, sequence: int = 0) -> InputBatch:
        return self._batch(task, [[7 * position for position in range(start, end)]], start, wanted, sequence)

    def _batch(
        self, task: Task, tokens: Sequence[Sequence[int]], start: int, wanted: bool, sequence: int
    ) -> InputBatch:
        """A step in which each of `tokens` continues a sequence, counted from `sequence`, at position `start`."""
        each = _sequence_tokens(task)
        base = self._shallow if task.depth else 0
        count, length = len(tokens), len(tokens[0])
        positions = np.tile(np.arange(start, start + length), count)
        first_blocks = (base + (sequence + np.arange(count)) * each) // BLOCK_SIZE
        query_start = (np.arange(count + 1) * length).astype(np.int32)
        return InputBatch.of_tables(
            token_ids=(np.concatenate(tokens) % self.model.config.vocab_size).astype(np.int32),
            positions=positions.astype(np.int32),
            query_start=query_start,
            seq_lens=np.full(count, start + length, np.int32),
            tables=(first_blocks[:, None] + np.arange(each // BLOCK_SIZE)[None, :]).astype(np.int32),
            output_rows=(query_start[1:] - 1 if wanted else np.empty(0)).astype(np.int32),
            block_size=BLOCK_SIZE,
            num_groups=self._num_groups,
        )


@contextmanager
def open_stepper(path: Path, backend: CpuBackend, tasks: Iterable[Task]) -> Iterator[Stepper]:
    """Loads the model at `path` for these tasks and releases it afterwards."""
    with open_model(path) as files:
        stepper = Stepper(load_model(files), backend, tasks)
        try:
            yield stepper
        finally:
            stepper.executable.close()


def _sequence_tokens(task: Task) -> int:
    """Slots of one sequence, in whole blocks."""
    return -(-(task.depth + task.tokens) // BLOCK_SIZE) * BLOCK_SIZE


def _cache_tokens(task: Task) -> int:
    return task.batch * _sequence_tokens(task)
