"""Runs nothing and counts everything: a program's operations and bytes, step by step, for plans and simulations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvarn.backends.base import InputBatch, KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.checks import check_batch
from kvarn.kv_types import KV_TYPES
from kvarn.program import Program
from kvarn.program.counts import Counts, StepShape, count_step
from kvarn.tensors import DType, TensorSource


class NullBackend:
    """A back-end without arithmetic. Stateless."""

    name = "null"

    def memory_use(
        self, program: Program, dtypes: Mapping[str, DType], kv: KvCacheSpec, limits: StepLimits
    ) -> MemoryUse:
        """Its zero logits."""
        del dtypes, kv
        return MemoryUse(0, 0, 0, 4 * limits.max_num_tokens * program.vocab_size)

    def load(self, program: Program, weights: TensorSource, kv: KvCacheSpec, limits: StepLimits) -> NullExecutable:
        """Looks at the sizes of the weights, reads none."""
        return NullExecutable(program, weights, kv, limits)


class NullExecutable:
    """Checks batches like any executable, and adds up what they would cost in `counts` (by kind of op)."""

    def __init__(self, program: Program, weights: TensorSource, kv: KvCacheSpec, limits: StepLimits) -> None:
        self.program = program
        self.kv = kv
        self.limits = limits
        self.counts: dict[str, Counts] = {}
        self.steps = 0
        self._bytes = {weight.name: weights.tensor(weight.name).nbytes for weight in program.weights}
        self._logits = np.zeros((limits.max_num_tokens, program.vocab_size), dtype=np.float32)

    def execute(self, batch: InputBatch, outputs: Sequence[str] = ()) -> Mapping[str, NDArray[np.float32]]:
        """Counts the step. Logits are zero but for token (position + 1) modulo the vocabulary, so that greedy choices
        differ from step to step; other outputs are zero."""
        check_batch(batch, self.program, self.kv, self.limits)
        spans = zip(np.diff(batch.query_start), batch.seq_lens, strict=True)
        shape = StepShape(tuple((int(n), int(end)) for n, end in spans), int(batch.output_rows.size))
        step = count_step(self.program, shape, self._bytes.__getitem__, KV_TYPES[self.kv.dtype])
        for kind, cost in step.items():
            self.counts[kind] = self.counts.get(kind, Counts()) + cost
        self.steps += 1
        logits = self._logits[: batch.output_rows.size]
        logits[:] = 0
        logits[np.arange(len(logits)), (batch.positions[batch.output_rows] + 1) % self.program.vocab_size] = 1
        named = {name: np.zeros((batch.num_tokens, self.program.buffer(name).width), np.float32) for name in outputs}
        return {**named, self.program.output: logits}

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Nothing to copy."""

    def move_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Nothing to copy."""

    def commit(self) -> int:
        """There is no memory."""
        return 0

    @property
    def block_bytes(self) -> int:
        """What a block would take."""
        return self.program.kv_groups.block_bytes(KV_TYPES[self.kv.dtype], self.kv.block_size)

    def read_block(self, block: int, out: NDArray[np.uint8]) -> None:
        """Nothing to read."""

    def write_block(self, block: int, data: NDArray[np.uint8]) -> None:
        """Nothing to write."""

    def close(self) -> None:
        """Nothing to release."""
