"""One model on a card: how long prompts and decode steps take, and what share of the card's roof that is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvarn.backends import InputBatch, KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.cuda import CudaBackend, card_memory
from kvarn.backends.cuda.clock import Clock, Peak
from kvarn.backends.cuda.libraries import allocated_bytes
from kvarn.backends.cuda.memory import weight_sizes
from kvarn.backends.cuda.roof import CardRoof
from kvarn.backends.row_rules import RowRules
from kvarn.bench.batches import BLOCK_SIZE, KV, TaskBatches
from kvarn.bench.latency import Progress, Sizes
from kvarn.bench.limits import Limit
from kvarn.bench.statistics import Spread
from kvarn.bench.tasks import Task
from kvarn.config import CudaConfig
from kvarn.errors import CapacityError
from kvarn.models import Model, load_model
from kvarn.planning.sizes import size_text
from kvarn.program.counts import Counts, count_step, total
from kvarn.request import SamplingParams
from kvarn.sampling.rules import RuleBook
from kvarn.step import NewSequence
from kvarn.weights import open_model


@dataclass(frozen=True, slots=True)
class CardRow:
    """What one task took, and the share of the roof that its median is."""

    task: Task
    seconds: tuple[float, ...]
    """Of each round."""
    tokens_per_s: Spread
    step_ms: float
    """Median, of one step."""
    cost: Counts
    """Of all timed steps."""
    bytes_per_s: float
    flops_per_s: float
    share: float
    """Of the limit: 1 is as fast as the card can."""
    limit: Limit


@dataclass(frozen=True, slots=True)
class CardLatency:
    """The results of `kvarn bench latency --device cuda`."""

    rows: tuple[CardRow, ...]
    roof: CardRoof
    """The mean of before and after."""
    load_s: float
    planned_bytes: int
    """Of what torch's allocator has."""
    peak_bytes: int | None
    """That it had at most; None where nothing says so (in the interpreter)."""


class CardStepper:
    """A model on the card with room for certain tasks. Owns the executable; one caller at a time."""

    def __init__(self, model: Model, config: CudaConfig, tasks: Sequence[Task]) -> None:
        """Raises CapacityError where that is more than the card has free, else as `CudaBackend.load` does."""
        self._steps = steps = TaskBatches(model, tasks)
        prompts = (min(task.chunk, max(task.depth, task.tokens if task.op == "prefill" else 1)) for task in tasks)
        limits = StepLimits(max(steps.batch, *prompts), steps.batch, steps.longest)
        kv, backend = KvCacheSpec(steps.num_blocks, BLOCK_SIZE, KV.name), CudaBackend(config)
        dtypes = {weight.name: model.weights.tensor(weight.name).dtype for weight in model.program.weights}
        self.memory: MemoryUse = backend.memory_use(model.program, dtypes, kv, limits)
        if config.device == "cuda":
            _check_room(self.memory, *card_memory(config.device))
        self.executable = backend.load(model.program, model.weights, kv, limits)
        self._rules = RuleBook(model.program.vocab_size)
        for sequence in range(steps.batch):
            self._rules.add(NewSequence(sequence, (), SamplingParams(temperature=0.0), 0, 0))

    def seconds(self, task: Task) -> float:
        """Wall time of the task's steps, one behind the other as an engine submits them: tokens are chosen greedily on
        the card, where the next step reads them."""
        for batch in self._steps.context(task):
            self.executable.execute(batch)
        while self.executable.prepare():  # graphs, which an engine records when it has nothing to do
            pass
        steps = list(self._submitted(task))
        started = time.perf_counter()
        for number, step in enumerate(steps):
            self.executable.submit(*step)
            if number:
                self.executable.collect()
        self.executable.collect()
        return time.perf_counter() - started

    def _submitted(self, task: Task) -> Iterator[tuple[InputBatch, RowRules, NDArray[np.int32]]]:
        for number, batch in enumerate(self._steps.timed(task)):
            count = int(batch.output_rows.size)
            rules = self._rules.of(range(count), batch.seq_lens[:count].tolist())
            follows = task.op == "decode" and number > 0
            previous = np.arange(count) if follows else np.full(batch.num_tokens, -1)
            yield batch, rules, previous.astype(np.int32)


def measure_card_latency(
    path: Path,
    sizes: Sizes,
    tasks: Sequence[Task],
    config: CudaConfig,
    *,
    clock: Clock,
    probe: Callable[[], CardRoof],
    rounds: int,
    progress: Progress = lambda _done, _total: None,
) -> CardLatency:
    """Times the tasks in turns, after a round that compiles kernels and records graphs; the roof before and after."""
    before, times, done = probe(), {task.name: list[float]() for task in tasks}, 0
    total_tasks = (rounds + 1) * len(tasks)
    with Peak(clock) as peak, open_model(path) as files:
        started = time.perf_counter()
        stepper = CardStepper(load_model(files), config, tasks)
        load_s = time.perf_counter() - started
        try:
            for number in range(rounds + 1):
                for task in tasks:
                    seconds = stepper.seconds(task)
                    if number:
                        times[task.name].append(seconds)
                    done += 1
                    progress(done, total_tasks)
        finally:
            stepper.executable.close()
    after = probe()
    roof = CardRoof((before.copy_bytes + after.copy_bytes) / 2, (before.flops + after.flops) / 2, before.dtype)
    rows = tuple(card_row(task, times[task.name], card_cost(sizes, task, config), roof) for task in tasks)
    return CardLatency(rows, roof, load_s, allocated_bytes(stepper.memory), peak.num_bytes)


def card_cost(sizes: Sizes, task: Task, config: CudaConfig) -> Counts:
    """The fewest operations and bytes of all timed steps, with the weights as the card holds them."""
    held = weight_sizes(sizes.program, sizes.dtypes, config)
    return sum((total(count_step(sizes.program, shape, held.__getitem__, KV)) for shape in task.steps()), Counts())


def card_row(task: Task, seconds: Sequence[float], cost: Counts, roof: CardRoof) -> CardRow:
    """A task's figures from its times."""
    median = statistics.median(seconds)
    moving, computing = cost.bytes / roof.copy_bytes, cost.flops / roof.flops
    return CardRow(
        task=task,
        seconds=tuple(seconds),
        tokens_per_s=Spread.of([task.total_tokens / s for s in seconds]),
        step_ms=1e3 * median / task.num_steps,
        cost=cost,
        bytes_per_s=cost.bytes / median,
        flops_per_s=cost.flops / median,
        share=max(moving, computing) / median,
        limit=Limit.MEMORY if moving >= computing else Limit.ARITHMETIC,
    )


def _check_room(use: MemoryUse, free: int, source: str) -> None:
    if use.total > free:
        raise CapacityError(
            f"the tasks take {size_text(use.total)} of the card, {size_text(use.kv_cache)} of it KV cache, but "
            f"{size_text(free)} are there ({source}): smaller --batch, --depth or --prefill take less"
        )
