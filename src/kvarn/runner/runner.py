"""`Runner`: executes what the scheduler decided and samples."""

from __future__ import annotations

from collections.abc import Sequence

from kvarn.backends import Executable, StepLimits
from kvarn.runner.batch import BatchBuilder
from kvarn.runner.block_file import BlockFile
from kvarn.runner.block_mover import BlockMover
from kvarn.sampling import Sampler
from kvarn.step import SampledToken, ScheduledSequence, SchedulerOutput, StepOutput


class Runner:
    """One loaded program with its sampler. Knows of sequences only what a step says; the sampler keeps the rest.

    Owns the executable and closes it. Not thread-safe.
    """

    def __init__(
        self,
        executable: Executable,
        sampler: Sampler,
        limits: StepLimits,
        block_size: int,
        *,
        logits: str = "logits",
        block_file: BlockFile | None = None,
    ) -> None:
        """limits: those the executable was loaded with. logits: the program's output buffer.

        block_file: where blocks are saved and loaded, owned from now on; None: a step must not ask for that.
        """
        self._blocks = BlockMover(executable, block_file)
        self._executable = executable
        self._sampler = sampler
        self._num_groups = len(executable.program.kv_groups)
        self._batches = BatchBuilder(limits, block_size, self._num_groups)
        self._logits = logits
        self._known: set[int] = set()

    def execute(self, scheduled: SchedulerOutput) -> StepOutput:
        """Runs a step: forgets who finished, moves blocks, runs the program, samples. A step may be empty."""
        self._blocks.save(scheduled.block_saves)
        for sequence_id in scheduled.finished:
            self._known.discard(sequence_id)
            self._sampler.remove(sequence_id)
        for new in scheduled.new:
            self._sampler.add(new)
            self._known.add(new.sequence_id)
        if scheduled.block_copies:
            self._executable.copy_blocks(scheduled.block_copies)
        loaded = self._blocks.load(scheduled.block_loads)
        sampled = self._compute(scheduled.sequences) if scheduled.sequences else []
        return StepOutput(scheduled.step, tuple(sampled), loaded, self._blocks.take_seconds())

    def _compute(self, sequences: Sequence[ScheduledSequence]) -> list[SampledToken]:
        logits = self._executable.execute(self._batches.build(sequences))[self._logits]
        rows = [s for s in sequences if s.sample]
        if not rows:
            return []
        return self._sampler.sample(logits, [s.sequence_id for s in rows], [s.end for s in rows])

    def reset(self) -> None:
        """Forgets all sequences, then runs one token to see that the program still runs. Raises what that raises."""
        for sequence_id in self._known:
            self._sampler.remove(sequence_id)
        self._known.clear()
        tables = ((0,),) * self._num_groups
        probe = ScheduledSequence(sequence_id=-1, token_ids=(0,), start=0, block_tables=tables, sample=True)
        self._executable.execute(self._batches.build((probe,)))

    def close(self) -> None:
        """Closes the executable and the block file. Idempotent."""
        self._executable.close()
        self._blocks.close()
