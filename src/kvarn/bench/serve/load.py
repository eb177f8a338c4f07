"""Sends requests: at planned moments whether or not others are answered (open loop), or so many at a time (closed)."""

from __future__ import annotations

import asyncio
import itertools
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kvarn.bench.serve.client import Client, Reply
from kvarn.bench.serve.metrics import ClientLoad, Window
from kvarn.bench.serve.ranks import Distribution
from kvarn.errors import ConfigError

TICK_SECONDS = 0.05
MOST_REQUESTS = 10_000_000
MOST_SECONDS = 86_400.0

Told = Callable[[int], None]
"""Called with the number of requests that are at their end."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How long a load is: `warmup` seconds that are not measured, then `requests` requests or `seconds` seconds.

    Raises ConfigError naming the option.
    """

    requests: int | None = None
    seconds: float | None = None
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if (self.requests is None) == (self.seconds is None):
            raise ConfigError("give either --requests or --seconds")
        if self.requests is not None and not 1 <= self.requests <= MOST_REQUESTS:
            raise ConfigError(f"--requests must be between 1 and {MOST_REQUESTS}, not {self.requests}")
        if self.seconds is not None and not 0 < self.seconds <= MOST_SECONDS:
            raise ConfigError(f"--seconds must be above 0 and at most {MOST_SECONDS:g}, not {self.seconds}")
        if not 0 <= self.warmup <= MOST_SECONDS:
            raise ConfigError(f"--warmup must be between 0 and {MOST_SECONDS:g} seconds, not {self.warmup}")

    def cut(self, times: Iterable[float]) -> Iterator[float]:
        """The moments of an open loop that belong to it."""
        if self.seconds is not None:
            end = self.warmup + self.seconds
            yield from itertools.takewhile(lambda moment: moment < end, times)
            return
        assert self.requests is not None
        measured = 0
        for moment in times:
            measured += moment >= self.warmup
            yield moment
            if measured == self.requests:
                return

    def share(self, done: int, elapsed: float) -> float:
        """How much of it is over, after so many answers and seconds."""
        if self.seconds is not None:
            return min(1.0, elapsed / (self.warmup + self.seconds))
        assert self.requests is not None
        return min(1.0, done / self.requests)

    def window(self, sent: float, end: float) -> Window:
        """What is measured; without `seconds`, from `sent`, the first request after the warm-up, to the last answer's
        end."""
        if self.seconds is not None:
            return Window(self.warmup, self.warmup + self.seconds)
        return Window(min(sent, end), end)


@dataclass(frozen=True, slots=True)
class Load:
    """What came of one. begin: by the replies' clock."""

    replies: list[Reply]
    begin: float
    client: ClientLoad

    def window(self, extent: Extent) -> Window:
        """The measured part of it."""
        planned = [reply.planned - self.begin for reply in self.replies]
        first = min((moment for moment in planned if moment >= extent.warmup), default=0.0)
        return extent.window(first, max((reply.end - self.begin for reply in self.replies), default=0.0))


async def open_loop(
    client: Client, requests: Iterable[tuple[float, bytes]], told: Told = lambda _done: None
) -> Load:
    """Sends each body at its moment, in seconds from now, and waits for all answers."""
    replies: list[Reply] = []
    watch = _Watch()
    tasks: set[asyncio.Task[None]] = set()

    async def one(body: bytes, planned: float) -> None:
        replies.append(await client.ask(body, planned))
        told(len(replies))

    for moment, body in requests:
        planned = watch.begin + moment
        wait = planned - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(one(body, planned))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    while tasks:
        await asyncio.wait(tasks)
    return Load(replies, watch.begin, await watch.stop())


async def closed_loop(
    client: Client, bodies: Iterator[bytes], concurrency: int, extent: Extent, told: Told = lambda _done: None
) -> Load:
    """So many requests at a time, each sent when another has ended; those begun at the end are waited for."""
    replies: list[Reply] = []
    watch = _Watch()
    measured = itertools.count()

    def goes_on() -> bool:
        now = time.perf_counter() - watch.begin
        if extent.seconds is not None:
            return now < extent.warmup + extent.seconds
        assert extent.requests is not None
        return now < extent.warmup or next(measured) < extent.requests

    async def one() -> None:
        while goes_on():
            replies.append(await client.ask(next(bodies)))
            told(len(replies))

    await asyncio.gather(*(one() for _ in range(concurrency)))
    return Load(replies, watch.begin, await watch.stop())


class _Watch:
    """Notes how late this process' own timers wake up, and the processor time it takes, from now until `stop`."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self._cpu = time.process_time()
        self._late: list[float] = []
        self._task = asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            due = time.perf_counter() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            self._late.append(max(0.0, time.perf_counter() - due))

    async def stop(self) -> ClientLoad:
        """What was noted."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        seconds, cpu = time.perf_counter() - self.begin, time.process_time() - self._cpu
        return ClientLoad(seconds, cpu, Distribution.of(self._late))


def allow_connections() -> None:
    """Lets this process have as many open connections as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
