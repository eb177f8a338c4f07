"""One model on this machine: how long prompts and decode steps take, and what share of the roof that is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvarn.backends.cpu import Cost, step_cost
from kvarn.bench.batches import KV
from kvarn.bench.limits import Limit, bound
from kvarn.bench.machine import Machine
from kvarn.bench.process import Worker, kvarn_command
from kvarn.bench.roofline import Roof, RoofProbe, middle
from kvarn.bench.statistics import Spread
from kvarn.bench.tasks import Task
from kvarn.models import load_model
from kvarn.program import Program
from kvarn.tensors import DType
from kvarn.weights import open_model

Progress = Callable[[int, int], None]
Probe = Callable[[], Roof]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model whose weights are not read: enough to say what its steps cost."""

    program: Program
    dtypes: Mapping[str, DType]
    max_positions: int

    def cost(self, task: Task) -> Cost:
        """Of all timed steps of a task."""
        return sum((step_cost(self.program, shape, self.dtypes, KV) for shape in task.steps()), Cost())


@dataclass(frozen=True, slots=True)
class Row:
    """What one task took, and the share of the roof that its median is."""

    task: Task
    seconds: tuple[float, ...]
    """Of each round."""
    tokens_per_s: Spread
    step_ms: float
    """Median, of one step."""
    cost: Cost
    bytes_per_s: float
    macs_per_s: float
    share: float
    """Of the limit, the median of the rounds: 1 is as fast as the machine could at that time."""
    limit: Limit
    roof: Roof
    """The median of the roofs around each round."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Of one task in turns. seconds: of each round by worker. roofs: around each round of the first worker."""

    seconds: dict[str, list[float]]
    roofs: list[Roof] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Latency:
    """The results of `kvarn bench latency`."""

    rows: tuple[Row, ...]
    roof: Roof
    """The median of the rows'."""
    load_s: float
    peak_rss: int


def read_sizes(path: Path) -> Sizes:
    """Opens the model's files and reads what they say, but no weights."""
    with open_model(path) as files:
        model = load_model(files)
        dtypes = {weight.name: model.weights.tensor(weight.name).dtype for weight in model.program.weights}
        return Sizes(model.program, dtypes, model.config.max_positions)


def measure_latency(
    path: Path,
    sizes: Sizes,
    tasks: Sequence[Task],
    *,
    machine: Machine,
    threads: int,
    isa: str,
    rounds: int,
    progress: Progress = lambda _done, _total: None,
) -> Latency:
    """Times the tasks in turns in a process of its own, after a round that warms up; the roof before and after each."""
    with Worker("kvarn", kvarn_command(path, threads, isa, tasks)) as worker:
        times = time_in_turns([worker], tasks, rounds, RoofProbe(isa, threads, machine), progress)
        load_s, peak_rss = worker.load_s, worker.peak_rss
    rows = tuple(
        make_row(task, times[task.name].seconds["kvarn"], sizes.cost(task), times[task.name].roofs) for task in tasks
    )
    return Latency(rows, middle([row.roof for row in rows]), load_s, peak_rss)


def time_in_turns(
    workers: Sequence[Worker], tasks: Sequence[Task], rounds: int, probe: Probe, progress: Progress
) -> dict[str, Timings]:
    """Timings by task. In every round each task is done by all workers in turn; the first round is not counted.

    probe: called before and after the first worker's turn.
    """
    times = {task.name: Timings({worker.name: [] for worker in workers}) for task in tasks}
    total = (rounds + 1) * len(tasks) * len(workers)
    done = 0
    progress(done, total)
    for number in range(rounds + 1):
        for task in tasks:
            before = probe()
            for worker in workers:
                seconds = worker.seconds(task)
                if worker is workers[0]:
                    roof = middle([before, probe()])
                if number:
                    times[task.name].seconds[worker.name].append(seconds)
                done += 1
                progress(done, total)
            if number:
                times[task.name].roofs.append(roof)
    return times


def make_row(task: Task, seconds: Sequence[float], cost: Cost, roofs: Sequence[Roof]) -> Row:
    """A task's figures from its times and the roofs at those times."""
    rates = Spread.of([task.total_tokens / s for s in seconds])
    median = Spread.of(seconds).median
    roof = middle(roofs)
    shares = (bound(cost, around)[0] / s for s, around in zip(seconds, roofs, strict=True))
    return Row(
        task=task,
        seconds=tuple(seconds),
        tokens_per_s=rates,
        step_ms=1e3 * median / task.num_steps,
        cost=cost,
        bytes_per_s=cost.bytes / median,
        macs_per_s=cost.macs / median,
        share=statistics.median(shares),
        limit=bound(cost, roof)[1],
        roof=roof,
    )
