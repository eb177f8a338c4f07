"""The middle of several measurements, how far they lie apart, and how sure their mean is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of several values."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return Spread(statistics.median(values), min(values), max(values))


T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t distribution with 1, 2, … 30 degrees of freedom."""
NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class Interval:
    """Mean of repeated measurements, and how far to both sides its 95 % confidence interval goes."""

    mean: float
    half: float | None
    """By Student's t; None of a single measurement."""

    @staticmethod
    def of(values: Sequence[float]) -> Interval:
        """The interval of at least one value."""
        mean, count = statistics.fmean(values), len(values)
        if count < 2:
            return Interval(mean, None)
        t = T_95[count - 2] if count - 2 < len(T_95) else NORMAL_95
        return Interval(mean, t * statistics.stdev(values) / count**0.5)
