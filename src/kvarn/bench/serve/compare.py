"""Two servers under the same load in turns, and the ratios of their figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvarn.bench.serve.metrics import Summary
from kvarn.bench.serve.offer import Offer
from kvarn.bench.serve.point import Bench, Lane, Point, Progress, silent
from kvarn.bench.statistics import Interval


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a summary. unit: what it is multiplied with to be shown. less: less is better."""

    name: str
    of: Callable[[Summary], float | None]
    unit: float = 1.0
    less: bool = False


def _time(name: str, percentile: int) -> Callable[[Summary], float | None]:
    def of(summary: Summary) -> float | None:
        found = summary.times[name]
        return None if found is None else found.at(percentile)

    return of


RATES = (
    Figure("requests/s", lambda summary: summary.requests_per_s),
    Figure("prompt tokens/s", lambda summary: summary.prompt_tokens_per_s),
    Figure("output tokens/s", lambda summary: summary.output_tokens_per_s),
    Figure("goodput, requests/s", lambda summary: summary.goodput),
)
FIGURES = (
    *RATES,
    *(
        Figure(f"{name.upper()} P{percentile}, ms", _time(name, percentile), 1e3, less=True)
        for name in ("ttft", "tpot", "itl", "e2e")
        for percentile in (50, 95, 99)
    ),
)


@dataclass(frozen=True, slots=True)
class Ratio:
    """The second server's figure over the first's: geometric mean over the turns, and its 95 % interval."""

    figure: Figure
    first: float
    second: float
    ratio: float
    low: float | None
    high: float | None

    @property
    def better(self) -> str:
        """`first` or `second` where the interval leaves no doubt, else ""."""
        if self.low is None or self.high is None or self.low <= 1 <= self.high:
            return ""
        return "second" if (self.ratio < 1) == self.figure.less else "first"


async def in_turns(
    lanes: Sequence[Lane], bench: Bench, offer: Offer, repeats: int, progress: Progress = silent
) -> list[list[Point]]:
    """The points of each lane. In each turn every lane has the same requests, one lane after the other."""
    points: list[list[Point]] = [[] for _ in lanes]
    for turn in range(repeats):
        for lane, found in zip(lanes, points, strict=True):
            found.append(await lane.measure(bench, offer, str(turn), progress))
    return points


def ratios(first: Sequence[Point], second: Sequence[Point]) -> list[Ratio]:
    """Of each figure that both have in every turn and that is above 0."""
    found = []
    for figure in FIGURES:
        pairs = [(figure.of(a.summary), figure.of(b.summary)) for a, b in zip(first, second, strict=True)]
        known = [(a, b) for a, b in pairs if a and b]
        if len(known) == len(pairs):
            found.append(_ratio(figure, known))
    return found


def _ratio(figure: Figure, pairs: Sequence[tuple[float, float]]) -> Ratio:
    logs = Interval.of([math.log(b / a) for a, b in pairs])
    low = high = None
    if logs.half is not None:
        low, high = math.exp(logs.mean - logs.half), math.exp(logs.mean + logs.half)
    first, second = (figure.unit * Interval.of(values).mean for values in zip(*pairs, strict=True))
    return Ratio(figure, first, second, math.exp(logs.mean), low, high)
