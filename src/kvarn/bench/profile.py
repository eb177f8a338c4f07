"""Where a step's time goes: each stage's time beside what it must move and multiply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from kvarn.backends.cpu import Cost, StageCost, StageCounter, stage_costs
from kvarn.bench.batches import KV
from kvarn.bench.latency import Probe, Progress, Sizes
from kvarn.bench.limits import Limit, bound
from kvarn.bench.roofline import Roof, middle
from kvarn.bench.stepper import Stepper
from kvarn.bench.tasks import Task

By = Literal["op", "layer"]
REST = "barriers and rest"
OUTSIDE = "outside"
DECODE_STEPS = 16


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """Stages of one name, or of one layer."""

    name: str
    ms: float
    """Of one step: the mean over a round."""
    part: float
    """Of the step: 1 is all of it."""
    stages: int
    cost: Cost
    """Of all steps of the round."""
    activation_bytes: int
    """Of all steps of the round."""
    bytes_per_s: float
    macs_per_s: float
    share: float | None
    """Of the roof; None where no multiply-adds are done, only rows moved."""
    limit: Limit | None
    waiting: float
    """Part of the time that its threads waited for one another."""


@dataclass(frozen=True, slots=True)
class StepProfile:
    """One task. rows: in the order of the step; with `rest_ms`, where no stage ran, they add up to `step_ms`."""

    task: Task
    step_ms: float
    rows: tuple[ProfileRow, ...]
    rest_ms: float
    share: float
    """Of the roof that all stages together are."""
    roof: Roof
    """Around the round that is shown."""


@dataclass(slots=True)
class _Sum:
    """Of stages that become one row."""

    span_ns: int = 0
    busy_ns: int = 0
    stages: int = 0
    cost: Cost = Cost()  # noqa: RUF009 - immutable
    activation_bytes: int = 0
    bound_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Round:
    seconds: float
    counters: list[StageCounter]
    roof: Roof


def profile_tasks(*, prefill: int, batch: int, depth: int) -> tuple[Task, ...]:
    """What `kvarn profile` looks into: a prompt, decode of one and of `batch` sequences, and decode at depth."""
    tasks = [
        Task(f"prefill {prefill}", "prefill", prefill),
        Task("decode, batch 1", "decode", DECODE_STEPS),
        Task(f"decode, batch {batch}", "decode", DECODE_STEPS, batch),
    ]
    if depth:
        tasks.append(Task(f"decode at {depth}", "decode", DECODE_STEPS, 1, depth))
    return tuple({task.name: task for task in tasks}.values())


def profile(
    stepper: Stepper,
    sizes: Sizes,
    tasks: Sequence[Task],
    probe: Probe,
    *,
    by: By = "op",
    rounds: int = 5,
    progress: Progress = lambda _done, _total: None,
) -> tuple[StepProfile, ...]:
    """Runs each task `rounds` times, after once to warm up, and profiles the round whose time is the median.

    probe: measures the roof; called before and after each round.
    """
    total, done = len(tasks) * (rounds + 1), 0
    found = []
    for task in tasks:
        stepper.prepare(task)
        times = []
        for _ in range(rounds + 1):
            times.append(_run(stepper, task, probe))
            done += 1
            progress(done, total)
        shown = sorted(times[1:], key=lambda each: each.seconds)[(rounds - 1) // 2]
        costs = [stage_costs(sizes.program, shape, sizes.dtypes, KV) for shape in task.steps()]
        found.append(step_profile(task, shown.seconds, shown.counters, costs, shown.roof, by))
    return tuple(found)


def _run(stepper: Stepper, task: Task, probe: Probe) -> _Round:
    executable = stepper.executable
    batches = list(stepper.batches(task))
    before = probe()
    executable.count_stages(True)
    started = perf_counter()
    for batch in batches:
        executable.execute(batch)
    seconds = perf_counter() - started
    counters = executable.stage_counters()
    executable.count_stages(False)
    return _Round(seconds, counters, middle([before, probe()]))


def step_profile(
    task: Task,
    seconds: float,
    counters: Sequence[StageCounter],
    costs: Sequence[Sequence[StageCost]],
    roof: Roof,
    by: By,
) -> StepProfile:
    """Joins times (of all the task's steps together) with costs (of each step), stage by stage."""
    steps, threads = len(costs), roof.threads
    name_of: Callable[[StageCost], str] = (lambda stage: stage.name) if by == "op" else _layer_name
    sums: dict[str, _Sum] = {}
    for index, counter in enumerate(counters):
        of_steps = [step[index] for step in costs]
        if counter.calls == 0:
            continue
        entry = sums.setdefault(name_of(of_steps[0]), _Sum())
        cost = sum((stage.cost for stage in of_steps), Cost())
        entry.span_ns += counter.span_ns
        entry.busy_ns += counter.busy_ns
        entry.stages += 1
        entry.cost += cost
        entry.activation_bytes += sum(stage.activation_bytes for stage in of_steps)
        entry.bound_s += bound(cost, roof)[0]
    rows = tuple(_row(name, entry, seconds, steps, threads, roof) for name, entry in sums.items())
    spent = sum(entry.span_ns for entry in sums.values()) / 1e9
    return StepProfile(
        task=task,
        step_ms=1e3 * seconds / steps,
        rows=rows,
        rest_ms=1e3 * (seconds - spent) / steps,
        share=sum(entry.bound_s for entry in sums.values()) / seconds,
        roof=roof,
    )


def _layer_name(stage: StageCost) -> str:
    return OUTSIDE if stage.layer is None else f"layer {stage.layer}"


def _row(name: str, entry: _Sum, seconds: float, steps: int, threads: int, roof: Roof) -> ProfileRow:
    spent = max(entry.span_ns, 1) / 1e9
    limited = entry.cost.macs > 0
    return ProfileRow(
        name=name,
        ms=1e3 * spent / steps,
        part=spent / seconds,
        stages=entry.stages,
        cost=entry.cost,
        activation_bytes=entry.activation_bytes,
        bytes_per_s=entry.cost.bytes / spent,
        macs_per_s=entry.cost.macs / spent,
        share=entry.bound_s / spent if limited else None,
        limit=bound(entry.cost, roof)[1] if limited else None,
        waiting=max(0.0, 1 - entry.busy_ns / (threads * max(entry.span_ns, 1))),
    )


def slowest(profile: StepProfile) -> ProfileRow | None:
    """The row that would gain most if it ran at its limit; None where no row has one."""
    rows: Iterable[ProfileRow] = (row for row in profile.rows if row.share is not None)
    return max(rows, key=lambda row: row.ms * (1 - (row.share or 0)), default=None)
