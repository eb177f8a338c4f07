"""Kinds of load: a rate, the moments of a trace, or so many requests at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvarn.bench.serve.arrivals import Arrivals
from kvarn.bench.serve.client import Client
from kvarn.bench.serve.load import Extent, Load, Told, closed_loop, open_loop
from kvarn.errors import ConfigError

MOST_CONCURRENCY = 100_000


class Offer(Protocol):
    """A way to send requests."""

    @property
    def name(self) -> str:
        """For tables."""
        ...

    @property
    def size(self) -> float:
        """Requests a second, or at a time."""
        ...

    async def run(self, client: Client, bodies: Iterator[bytes], extent: Extent, seed: str, told: Told) -> Load:
        """Sends bodies, as many as belong to the extent."""
        ...


@dataclass(frozen=True, slots=True)
class AtRate:
    """Open loop: `rate` requests a second on average."""

    rate: float
    arrivals: Arrivals

    def __post_init__(self) -> None:
        self.arrivals.times(self.rate, "")

    @property
    def name(self) -> str:
        """With what sets this kind of arrivals apart."""
        more = {"gamma": f" of burstiness {self.arrivals.burstiness:g}", "burst": f" of {self.arrivals.burst}"}
        return f"{self.rate:.4g} requests/s, {self.arrivals.kind}{more.get(self.arrivals.kind, '')}"

    @property
    def size(self) -> float:
        """The rate."""
        return self.rate

    async def run(self, client: Client, bodies: Iterator[bytes], extent: Extent, seed: str, told: Told) -> Load:
        """Sends them at the arrivals' moments."""
        times = extent.cut(self.arrivals.times(self.rate, seed))
        return await open_loop(client, zip(times, bodies, strict=False), told)


@dataclass(frozen=True, slots=True)
class AtTimes:
    """Open loop: at given moments, in seconds, as a trace has them."""

    times: Sequence[float]

    @property
    def name(self) -> str:
        """With the mean rate."""
        return f"{self.size:.4g} requests/s as traced"

    @property
    def size(self) -> float:
        """Requests a second on average."""
        return len(self.times) / (self.times[-1] or 1.0)

    async def run(self, client: Client, bodies: Iterator[bytes], extent: Extent, seed: str, told: Told) -> Load:
        """Sends them at the trace's moments, whatever the seed."""
        del seed
        return await open_loop(client, zip(extent.cut(self.times), bodies, strict=False), told)


@dataclass(frozen=True, slots=True)
class AtOnce:
    """Closed loop: `concurrency` requests at a time."""

    concurrency: int

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency <= MOST_CONCURRENCY:
            raise ConfigError(f"--concurrency must be between 1 and {MOST_CONCURRENCY}, not {self.concurrency}")

    @property
    def name(self) -> str:
        """How many."""
        return f"{self.concurrency} at a time"

    @property
    def size(self) -> float:
        """How many."""
        return self.concurrency

    async def run(self, client: Client, bodies: Iterator[bytes], extent: Extent, seed: str, told: Told) -> Load:
        """Sends each when another has ended."""
        del seed
        return await closed_loop(client, bodies, self.concurrency, extent, told)
