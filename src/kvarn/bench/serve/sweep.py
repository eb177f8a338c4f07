"""The highest load at which an SLO holds: doubled until it breaks, then halved between."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from kvarn.bench.serve.point import Point
from kvarn.errors import ConfigError

Measure = Callable[[float], Awaitable[Point]]
MOST_DOUBLINGS = 20


@dataclass(frozen=True, slots=True)
class Search:
    """How the highest load is looked for. Raises ConfigError naming the option.

    start: load of the first point. precision: the search ends when the lowest load that broke is at most this share
    above the highest that held. whole: loads are whole numbers, as those of a closed loop. most_points: it also ends
    after so many.
    """

    start: float
    precision: float = 0.1
    whole: bool = False
    most_points: int = 16

    def __post_init__(self) -> None:
        if not 0.005 <= self.precision <= 1:
            raise ConfigError(f"--precision must be between 0.005 and 1, not {self.precision}")
        if not 1 <= self.most_points <= 200:
            raise ConfigError(f"--points must be between 1 and 200, not {self.most_points}")

    @property
    def least(self) -> float:
        """The lowest load that is tried."""
        return 1.0 if self.whole else self.start / 2**MOST_DOUBLINGS

    def next(self, held: float | None, broke: float | None) -> float | None:
        """The load to measure after the highest that held and the lowest above it that broke; None: it is found."""
        if broke is None:
            return self.start if held is None else min(2 * held, self.start * 2**MOST_DOUBLINGS)
        if held is None:
            lower = max(self.least, int(broke / 2) if self.whole else broke / 2)
            return lower if lower < broke else None
        if broke <= held * (1 + self.precision) or (self.whole and broke - held <= 1):
            return None
        return float(int(held + broke) // 2) if self.whole else (held * broke) ** 0.5


@dataclass(frozen=True, slots=True)
class Sweep:
    """Points in the order they were measured. best: the highest that held below all that broke; None: none held.

    bracketed: whether a load above it broke; else the search ended before."""

    points: list[Point] = field(default_factory=list)
    best: Point | None = None
    bracketed: bool = False

    @property
    def curve(self) -> list[Point]:
        """By load."""
        return sorted(self.points, key=lambda point: point.size)


async def find_highest(measure: Measure, search: Search, told: Callable[[Point], None] = lambda _point: None) -> Sweep:
    """Measures points until the search ends. told: called with each."""
    points: list[Point] = []
    best: Point | None = None
    broke: float | None = None
    while len(points) < search.most_points:
        size = search.next(None if best is None else best.size, broke)
        if size is None or (best is not None and size <= best.size):
            break
        point = await measure(size)
        points.append(point)
        told(point)
        if point.holds:
            best = point
        else:
            broke = size
    return Sweep(points, best, broke is not None)
