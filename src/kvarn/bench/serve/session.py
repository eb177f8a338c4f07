"""Everything that happens between the options and the report."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TypeVar

from kvarn.bench.serve.client import Target, loop_factory
from kvarn.bench.serve.compare import in_turns
from kvarn.bench.serve.load import allow_connections
from kvarn.bench.serve.offer import Offer
from kvarn.bench.serve.point import Bench, Lane, Point, Progress, open_lane, silent
from kvarn.bench.serve.sweep import Search, Sweep, find_highest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Turns:
    """The lanes' points, one for each turn."""

    lanes: Sequence[Lane]
    points: Sequence[Sequence[Point]]


def run_turns(
    targets: Sequence[Target], bench: Bench, offer: Offer, repeats: int, progress: Progress = silent
) -> Turns:
    """One load on one server or on several in turns. Raises ServerError where one does not answer at all."""

    async def work(lanes: Sequence[Lane]) -> Turns:
        return Turns(lanes, await in_turns(lanes, bench, offer, repeats, progress))

    return _with_lanes(targets, bench, work)


def run_sweep(
    target: Target,
    bench: Bench,
    at: Callable[[float], Offer],
    search: Search,
    progress: Progress = silent,
    told: Callable[[Point], None] = lambda _point: None,
) -> tuple[Lane, Sweep]:
    """The highest load at which the SLO holds. at: the load of a size. Raises ServerError."""

    async def work(lanes: Sequence[Lane]) -> tuple[Lane, Sweep]:
        (lane,) = lanes

        async def measure(size: float) -> Point:
            return await lane.measure(bench, at(size), f"sweep {size!r}", progress)

        return lane, await find_highest(measure, search, told)

    return _with_lanes([target], bench, work)


def _with_lanes(targets: Sequence[Target], bench: Bench, work: Callable[[Sequence[Lane]], Awaitable[T]]) -> T:
    async def opened() -> T:
        async with AsyncExitStack() as stack:
            lanes = [await stack.enter_async_context(open_lane(target, bench.dataset)) for target in targets]
            return await work(lanes)

    allow_connections()
    gc.freeze()  # what is imported and read lives to the end: collections during a load need not look at it
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(opened())
    finally:
        gc.unfreeze()
