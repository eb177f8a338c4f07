"""One model on this machine: how long prompts and decode steps take, and what share of the roof that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvarn.backends.cpu import Cost, step_cost
from kvarn.bench.limits import Limit, bound
from kvarn.bench.machine import Machine
from kvarn.bench.process import Worker, kvarn_command
from kvarn.bench.roofline import Roof, best, measure_roof
from kvarn.bench.statistics import Spread
from kvarn.bench.stepper import KV
from kvarn.bench.tasks import Task
from kvarn.models import load_model
from kvarn.program import Program
from kvarn.tensors import DType
from kvarn.weights import open_model

Progress = Callable[[int, int], None]


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
    """Of the limit: 1 is as fast as the machine can."""
    limit: Limit


@dataclass(frozen=True, slots=True)
class Latency:
    """The results of `kvarn bench latency`."""

    rows: tuple[Row, ...]
    roof: Roof
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
    """Times the tasks in turns in a process of its own, after a round that warms up; the roof before and afterwards."""
    roof = measure_roof(isa, threads, machine)
    with Worker("kvarn", kvarn_command(path, threads, isa, tasks)) as worker:
        times = time_in_turns([worker], tasks, rounds, progress)
        load_s, peak_rss = worker.load_s, worker.peak_rss
    roof = best(roof, measure_roof(isa, threads, machine))
    rows = tuple(make_row(task, times[task.name]["kvarn"], sizes.cost(task), roof) for task in tasks)
    return Latency(rows, roof, load_s, peak_rss)


def time_in_turns(
    workers: Sequence[Worker], tasks: Sequence[Task], rounds: int, progress: Progress
) -> dict[str, dict[str, list[float]]]:
    """Seconds by task and worker. In every round each task is done by all workers in turn; the first is not counted."""
    times: dict[str, dict[str, list[float]]] = {task.name: {worker.name: [] for worker in workers} for task in tasks}
    total = (rounds + 1) * len(tasks) * len(workers)
    done = 0
    progress(done, total)
    for number in range(rounds + 1):
        for task in tasks:
            for worker in workers:
                seconds = worker.seconds(task)
                if number:
                    times[task.name][worker.name].append(seconds)
                done += 1
                progress(done, total)
    return times


def make_row(task: Task, seconds: Sequence[float], cost: Cost, roof: Roof) -> Row:
    """A task's figures from its times."""
    rates = Spread.of([task.total_tokens / s for s in seconds])
    median = Spread.of(seconds).median
    least, limit = bound(cost, roof)
    return Row(
        task=task,
        seconds=tuple(seconds),
        tokens_per_s=rates,
        step_ms=1e3 * median / task.num_steps,
        cost=cost,
        bytes_per_s=cost.bytes / median,
        macs_per_s=cost.macs / median,
        share=least / median,
        limit=limit,
    )
