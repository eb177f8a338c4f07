"""Results as pictures: the times of one load or of two servers, and the curve of a sweep."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from kvarn import figures
from kvarn.bench.serve.answers import Answer
from kvarn.bench.serve.point import Point
from kvarn.bench.serve.slo import Slo
from kvarn.bench.serve.sweep import Sweep

COLORS = ("#2a6f97", "#c8553d", "#7a9e3c", "#8d6a9f")
SHADES = {50: "#9ec1d4", 95: "#5793b5", 99: "#1d4e6b"}
LIMIT, BEST = "#c8553d", "#7a9e3c"
TITLE_WIDTH = 130
BINS = 60
LEAST_BIN = 0.1
"""Seconds."""


def times(title: Sequence[str], lanes: Mapping[str, Sequence[Point]], slo: Slo) -> Any:
    """A figure of one load, a colour for each server: shares of TTFT and ITL, tokens a second, requests in flight."""
    figure, axes = figures.pyplot().subplots(2, 2, figsize=(11, 6.6), layout="constrained")
    for color, (name, points) in zip(COLORS, lanes.items(), strict=False):
        answers = [answer for point in points for answer in point.answers if not answer.failure]
        _share(axes[0, 0], [1e3 * answer.ttft for answer in answers if answer.ttft is not None], color, name)
        _share(axes[0, 1], [1e3 * gap for answer in answers for gap in answer.gaps], color, name)
        _over_time(axes[1, 0], points[-1].answers, color, name)
        _in_flight(axes[1, 1], points[-1].answers, color)
    for ax, name, label in ((axes[0, 0], "ttft", "time to first token, ms"), (axes[0, 1], "itl", "between tokens, ms")):
        ax.set_xlabel(label)
        ax.set_ylabel("per cent of them, at most")
        ax.set_ylim(0, 101)
        if name in slo.limits:
            ax.axvline(1e3 * slo.limits[name], color=LIMIT, linestyle=":", linewidth=1.2)
            ax.text(1e3 * slo.limits[name], 2, " SLO", color=LIMIT, fontsize=8)
    for ax, label in ((axes[1, 0], "output tokens/s"), (axes[1, 1], "requests in flight")):
        ax.set_xlabel("seconds since the begin" + (", of the last turn" if _turns(lanes) > 1 else ""))
        ax.set_ylabel(label)
        ax.set_ylim(0)
    if len(lanes) > 1:
        figure.legend(*axes[1, 0].get_legend_handles_labels(), frameon=False, loc="outside upper right", ncols=2)
    _title(figure, title)
    return figure


def sweep(title: Sequence[str], found: Sweep, slo: Slo, unit: str) -> Any:
    """A figure of a sweep: throughput and goodput, TTFT and ITL, each by load; the highest load that held is marked."""
    figure, axes = figures.pyplot().subplots(1, 3, figsize=(12.5, 3.9), layout="constrained")
    curve = found.curve
    loads = [point.size for point in curve]
    axes[0].plot(loads, [point.summary.requests_per_s for point in curve], "o-", color=COLORS[0], label="answered")
    axes[0].plot(loads, [point.summary.goodput for point in curve], "o-", color=COLORS[2], label="within the SLO")
    axes[0].set_ylabel("requests/s")
    axes[0].set_ylim(0)
    axes[0].legend(frameon=False)
    for ax, name, label in ((axes[1], "ttft", "time to first token, ms"), (axes[2], "itl", "between tokens, ms")):
        if name in slo.limits:  # before the axis gets its limits, so that the line is within them
            ax.axhline(1e3 * slo.limits[name], color=LIMIT, linestyle=":", linewidth=1.2)
            ax.text(loads[0], 1e3 * slo.limits[name], "SLO", color=LIMIT, fontsize=8, va="bottom")
        _percentile_lines(ax, curve, name)
        ax.set_ylabel(label)
    axes[2].legend(frameon=False)
    for ax in axes:
        ax.set_xlabel(unit)
        if found.best is not None:
            ax.axvline(found.best.size, color=BEST, linewidth=6, alpha=0.25, zorder=0)
    _title(figure, title)
    return figure


def _title(figure: Any, lines: Sequence[str]) -> None:
    """Says what was measured; a page that says so itself gives no lines."""
    wrapped = [part for line in lines for part in textwrap.wrap(line, TITLE_WIDTH)]
    if wrapped:
        figure.suptitle("\n".join(wrapped), x=0.01, ha="left", fontsize=10)


def _percentile_lines(ax: Any, curve: Sequence[Point], name: str) -> None:
    known = [(point.size, times) for point in curve if (times := point.summary.times[name]) is not None]
    for percentile, color in SHADES.items():
        ax.plot([load for load, _ in known], [1e3 * times.at(percentile) for _, times in known], "o-", ms=4,
                color=color, label=f"P{percentile}")  # fmt: skip
    values = [1e3 * times.at(percentile) for _, times in known for percentile in SHADES]
    if values and min(values) > 0 and max(values) > 30 * min(values):
        ax.set_yscale("log")
    elif values:
        ax.set_ylim(0)


def _share(ax: Any, values: list[float], color: str, name: str) -> None:
    """The share of values that are at most so large."""
    ordered = sorted(values)
    if not ordered:
        return
    ax.step(ordered, [100 * (place + 1) / len(ordered) for place in range(len(ordered))], where="post", color=color,
            label=name)  # fmt: skip
    if ordered[0] > 0 and ordered[-1] > 30 * ordered[0]:
        ax.set_xscale("log")


def _over_time(ax: Any, answers: Sequence[Answer], color: str, name: str) -> None:
    """Output tokens a second over the load's time."""
    end = max((answer.end for answer in answers), default=0.0)
    width = max(LEAST_BIN, end / BINS)
    bins = [0.0] * (int(end / width) + 1)
    for answer in answers:
        for stamp in answer.stamps:
            bins[int(stamp / width)] += answer.output_tokens / len(answer.stamps) / width
    edges = [number * width for number in range(len(bins) + 1)]
    ax.stairs(bins, edges, color=color, label=name, linewidth=1.4)


def _in_flight(ax: Any, answers: Sequence[Answer], color: str) -> None:
    """Requests sent and not at their end, over the load's time."""
    changes = sorted([(answer.sent, 1) for answer in answers] + [(answer.end, -1) for answer in answers])
    counts = list(itertools.accumulate(change for _, change in changes))
    ax.step([moment for moment, _ in changes], counts, where="post", color=color)


def _turns(lanes: Mapping[str, Sequence[Point]]) -> int:
    return max(len(points) for points in lanes.values())
