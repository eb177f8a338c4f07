"""Seconds of work on a device: warmed up, many times, the median, over inputs that no cache holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

L2_TIMES = 4
"""Inputs that are rotated take so many times the last cache together."""
SMALLEST_ROTATION = 256 << 20
MOST_SETS = 64
WARM_CALLS, WARM_SECONDS = 3, 0.05
LEAST_CALLS, MOST_CALLS, TIMED_SECONDS = 9, 200, 0.25
GRAPH_CALLS = 20
"""Calls in a captured graph: their launches cost the host nothing, which matters below about 0.1 ms each."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one call, in seconds: the median, and the quartiles around it."""

    median: float
    low: float
    high: float
    calls: int
    captured: bool
    """Whether the calls were replayed from a graph, without the host's part of a launch."""

    def as_json(self) -> dict[str, float | int | bool]:
        """For a row's detail."""
        return {"median_s": self.median, "quartile_low_s": self.low, "quartile_high_s": self.high,
                "calls": self.calls, "captured": self.captured}  # fmt: skip


class Clock:
    """Times calls on one device. quick: one call, cold, where nothing but that it runs is of interest."""

    def __init__(self, device: str, *, quick: bool = False) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.quick = quick

    def sets(self, set_bytes: int) -> int:
        """How many copies of inputs of so many bytes must be rotated so that the cache holds none of them."""
        if not self.cuda:
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        wanted = max(SMALLEST_ROTATION, L2_TIMES * cache)
        return max(1, min(MOST_SETS, -(-wanted // max(1, set_bytes))))

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def time(self, run: Callable[[int], object]) -> Timing:
        """Of run(i), i counting up: for choosing one of several sets of inputs."""
        calls = 1
        if not self.quick:
            each = self._warm_up(run)
            calls = max(LEAST_CALLS, min(MOST_CALLS, int(TIMED_SECONDS / max(each, 1e-7))))
        if not self.cuda:
            return _timing([_host_seconds(run, i) for i in range(calls)], captured=False)
        begins = [_event() for _ in range(calls)]
        ends = [_event() for _ in range(calls)]
        for i, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            begin.record()
            run(i)
            end.record()
        self.synchronize()
        seconds = [begin.elapsed_time(end) / 1e3 for begin, end in zip(begins, ends, strict=True)]
        return _timing(seconds, captured=False)

    def time_kernel(self, run: Callable[[int], object], sets: int = 1) -> Timing:
        """The same without the host's part: calls are captured in a graph, which is replayed.

        run must launch the same work whenever it is called with the same i, and not wait for the device. sets: of
        inputs that it chooses from by i; all of them are in the graph.
        """
        if not self.cuda:
            return self.time(run)
        self._warm_up(run)
        n = max(GRAPH_CALLS, sets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(n):
                run(i)
        timing = self.time(lambda _i: graph.replay())
        return Timing(timing.median / n, timing.low / n, timing.high / n, timing.calls * n, captured=True)

    def _warm_up(self, run: Callable[[int], object]) -> float:
        """Compiles and warms up. Returns about what a call takes."""
        for i in range(WARM_CALLS):
            run(i)
        self.synchronize()
        started, done = time.perf_counter(), 0
        while True:
            run(done)
            done += 1
            self.synchronize()
            spent = time.perf_counter() - started
            if spent >= WARM_SECONDS or done >= MOST_CALLS:
                return spent / done


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _host_seconds(run: Callable[[int], object], i: int) -> float:
    started = time.perf_counter()
    run(i)
    return time.perf_counter() - started


def _timing(seconds: list[float], *, captured: bool) -> Timing:
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return Timing(median, low, high, len(seconds), captured)


class Peak:
    """The most memory that the device's allocator held within a `with`, beyond what it held before. None on a CPU."""

    num_bytes: int | None = None

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._before = 0

    def __enter__(self) -> Peak:
        if self._clock.cuda:
            self._clock.synchronize()
            torch.cuda.reset_peak_memory_stats(self._clock.device)
            self._before = torch.cuda.memory_allocated(self._clock.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._clock.cuda:
            self._clock.synchronize()
            self.num_bytes = torch.cuda.max_memory_allocated(self._clock.device) - self._before
