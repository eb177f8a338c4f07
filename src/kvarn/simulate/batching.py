"""When requests that have arrived are handed to the scheduler: continuous, dynamic and static batching.

All three drive the same scheduler; what differs is only who is let in when.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

from kvarn.errors import ConfigError
from kvarn.traffic import Arrival

BATCHINGS = ("continuous", "dynamic", "static")
NEVER = math.inf


class Gate(Protocol):
    """Holds the arrivals that are not let in yet."""

    def arrive(self, arrival: Arrival, index: int) -> None:
        """A request came. index: its place in the traffic."""
        ...

    def release(self, now: float, busy: bool, last: bool) -> list[tuple[int, Arrival]]:
        """Those to be let in now. busy: the scheduler has sequences. last: no more will arrive."""
        ...

    def next_time(self) -> float:
        """When `release` may have more to give though nothing arrives and nothing ends."""
        ...


class Continuous:
    """Everybody at once: sequences join and leave at every step (Yu et al. 2022, Orca)."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Arrival]] = []

    def arrive(self, arrival: Arrival, index: int) -> None:
        """See `Gate`."""
        self._waiting.append((index, arrival))

    def release(self, now: float, busy: bool, last: bool) -> list[tuple[int, Arrival]]:
        """All."""
        del now, busy, last
        released, self._waiting = self._waiting, []
        return released

    def next_time(self) -> float:
        """Never."""
        return NEVER


class Batches:
    """A batch of `size`, or what has come `window` seconds after its first; the next when all of it have ended.

    An infinite window is static batching: only the last batch may be smaller.
    """

    def __init__(self, size: int, window: float) -> None:
        self._size = size
        self._window = window
        self._waiting: deque[tuple[int, Arrival]] = deque()
        self._busy = False

    def arrive(self, arrival: Arrival, index: int) -> None:
        """See `Gate`."""
        self._waiting.append((index, arrival))

    def release(self, now: float, busy: bool, last: bool) -> list[tuple[int, Arrival]]:
        """A batch, where nobody runs and it is full, has waited long enough, or nobody comes any more."""
        self._busy = busy
        if busy or not self._waiting:
            return []
        if len(self._waiting) < self._size and not last and now < self._due():
            return []
        return [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]

    def next_time(self) -> float:
        """When the first has waited for the window."""
        return NEVER if self._busy or not self._waiting else self._due()

    def _due(self) -> float:
        return self._waiting[0][1].time + self._window


def make_gate(name: str, size: int, window: float) -> Gate:
    """The way of batching of that name. size: of a batch. window: seconds, for dynamic. Raises ConfigError."""
    if name == "continuous":
        return Continuous()
    if name == "dynamic":
        return Batches(size, window)
    if name == "static":
        return Batches(size, NEVER)
    raise ConfigError(f"batching must be one of {', '.join(BATCHINGS)}, not {name!r}")
