"""The steps of tasks as the batches that executables run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kvarn.backends import InputBatch
from kvarn.bench.tasks import Task, chunks
from kvarn.kv_types import KV_TYPES
from kvarn.models import Model

BLOCK_SIZE = 16
KV = KV_TYPES["float16"]


class TaskBatches:
    """Batches of certain tasks in one KV cache, which has room for the largest without a context and the largest with
    one, so that a context is there for the next task that starts from it."""

    def __init__(self, model: Model, tasks: Sequence[Task]) -> None:
        self._vocab_size = model.config.vocab_size
        self._num_groups = len(model.program.kv_groups)
        self._shallow = max((_cache_tokens(task) for task in tasks if not task.depth), default=0)
        deep = max((_cache_tokens(task) for task in tasks if task.depth), default=0)
        self.num_blocks = (self._shallow + deep) // BLOCK_SIZE * self._num_groups
        """Of the cache."""
        self.batch = max(task.batch for task in tasks)
        """Most sequences of a step."""
        self.longest = max(task.depth + task.tokens for task in tasks)
        """Most tokens of a sequence."""
        self._deep: tuple[int, int] | None = None
        """Depth and slots of a sequence of the contexts that the cache holds."""

    def context(self, task: Task) -> Iterator[InputBatch]:
        """What makes the context that the task starts from, to be run now; nothing where it is there."""
        made = (task.depth, _sequence_tokens(task))
        if not task.depth or self._deep == made:
            return
        for sequence in range(task.batch):
            for start, end in chunks(task.depth, task.chunk):
                yield self._prompt(task, start, end, wanted=False, sequence=sequence)
        self._deep = made if task.batch == 1 else None

    def timed(self, task: Task) -> Iterator[InputBatch]:
        """The timed steps in order."""
        if task.op == "prefill":
            for start, end in chunks(task.tokens, task.chunk):
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
            token_ids=(np.concatenate(tokens) % self._vocab_size).astype(np.int32),
            positions=positions.astype(np.int32),
            query_start=query_start,
            seq_lens=np.full(count, start + length, np.int32),
            tables=(first_blocks[:, None] + np.arange(each // BLOCK_SIZE)[None, :]).astype(np.int32),
            output_rows=(query_start[1:] - 1 if wanted else np.empty(0)).astype(np.int32),
            block_size=BLOCK_SIZE,
            num_groups=self._num_groups,
        )


def _sequence_tokens(task: Task) -> int:
    """Slots of one sequence, in whole blocks."""
    return -(-(task.depth + task.tokens) // BLOCK_SIZE) * BLOCK_SIZE


def _cache_tokens(task: Task) -> int:
    return task.batch * _sequence_tokens(task)
