"""`Histogram`: observations counted in buckets, for the engine's thread to fill and others to read."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    """What a histogram has counted so far."""

    bounds: tuple[float, ...]
    """Upper bounds of the buckets, ascending; a value equal to a bound is in its bucket."""
    counts: tuple[int, ...]
    """Observations in each bucket (not cumulative); the last are above all bounds."""
    total: float
    """Sum of the observed values."""

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts)


class Histogram:
    """Counts in buckets. One thread observes; any thread may take snapshots meanwhile.

    A plain list and a bisection, since every generated token is observed: it costs about as much as a dict's look-up.
    """

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """bounds: see `HistogramSnapshot`."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> HistogramSnapshot:
        """As it is now. Taken while a value is observed, the sum may miss that one."""
        return HistogramSnapshot(self._bounds, tuple(self._counts), self._total)
