"""What an answer must keep to be good: limits on its times."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvarn.errors import ConfigError

if TYPE_CHECKING:
    from kvarn.bench.serve.answers import Answer
    from kvarn.bench.serve.metrics import Summary

TIMES = ("ttft", "tpot", "itl", "e2e")
MOST_MS = 3_600_000.0


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds by name; without any, every answer that came whole is good."""

    limits: Mapping[str, float] = field(default_factory=dict)
    percentile: int = 99
    """Of all requests of a run, for `broken`; and of one answer's gaps, for `good`."""

    @staticmethod
    def parse(text: str, percentile: int = 99) -> Slo:
        """`ttft:500,itl:30`, in milliseconds. Raises ConfigError."""
        limits: dict[str, float] = {}
        for part in text.split(",") if text else ():
            name, _, value = part.strip().partition(":")
            try:
                limit = float(value)
            except ValueError:
                limit = math.nan
            if name not in TIMES or not 0 < limit <= MOST_MS:
                raise ConfigError(
                    f"--slo must be limits in milliseconds such as ttft:500,itl:30, of {', '.join(TIMES)}; not {part!r}"
                )
            limits[name] = limit / 1e3
        if percentile not in (50, 95, 99):
            raise ConfigError(f"--slo-percentile must be 50, 95 or 99, not {percentile}")
        return Slo(limits, percentile)

    def good(self, answer: Answer) -> bool:
        """Whether an answer came whole and within all limits; of its gaps the percentile counts."""
        if answer.failure or (self.limits and answer.ttft is None):
            return False
        return all((answer.time(name, self.percentile) or 0.0) <= limit for name, limit in self.limits.items())

    def broken(self, summary: Summary) -> str:
        """Why a run as a whole does not keep it, "" where it does: by the percentile of all its requests, and every
        request must have been answered."""
        if summary.failed:
            kinds = ", ".join(f"{kind}: {count}" for kind, count in summary.errors.items())
            return f"{summary.failed} of {summary.requests} failed ({kinds})"
        if not summary.completed:
            return "nothing was answered"
        for name, limit in self.limits.items():
            times = summary.times[name]
            if times is not None and times.at(self.percentile) > limit:
                found = times.at(self.percentile)
                return f"P{self.percentile} {name.upper()} {1e3 * found:,.1f} ms is over {1e3 * limit:,.6g} ms"
        return ""

    def __str__(self) -> str:
        limits = ", ".join(f"{name.upper()} ≤ {1e3 * limit:,.6g} ms" for name, limit in self.limits.items())
        return f"P{self.percentile} {limits}" if limits else "every request is answered"
