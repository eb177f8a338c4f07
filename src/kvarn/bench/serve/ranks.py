"""Percentiles by nearest rank: each is a value that was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PERCENTILES = (50, 95, 99)


def ranked(ordered: Sequence[float], percentile: float) -> float:
    """The smallest of the values, which are in order, that at least `percentile` per cent of them do not exceed."""
    return ordered[max(0, -int(-len(ordered) * percentile // 100) - 1)]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Many values in short."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    most: float

    @staticmethod
    def of(values: Iterable[float]) -> Distribution | None:
        """None where there is no value."""
        ordered = sorted(values)
        if not ordered:
            return None
        p50, p95, p99 = (ranked(ordered, percentile) for percentile in PERCENTILES)
        return Distribution(len(ordered), sum(ordered) / len(ordered), p50, p95, p99, ordered[-1])

    def at(self, percentile: int) -> float:
        """One of `PERCENTILES`."""
        return {50: self.p50, 95: self.p95, 99: self.p99}[percentile]
