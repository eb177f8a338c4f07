"""Results as PNG files. matplotlib is imported when a plot is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvarn import figures
from kvarn.bench.limits import Limit
from kvarn.bench.machine import Machine
from kvarn.bench.profile import REST as REST_NAME
from kvarn.bench.profile import StepProfile
from kvarn.bench.roofline import Rooflines
from kvarn.bench.spec import OFF, Speculation
from kvarn.bench.statistics import Spread
from kvarn.bench.tasks import Task

READ, INTEGER, FLOAT, REST = "#2a6f97", "#c8553d", "#7a9e3c", "#c9c9c9"


def rooflines(path: Path, machine: Machine, result: Rooflines) -> None:
    """Bars of the three limits by number of threads."""
    plt = figures.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    names = [str(roof.threads) for roof in result.roofs]
    series = (
        ("memory read, GB/s", READ, [roof.read_bytes / 1e9 for roof in result.roofs]),
        ("int8 multiply-adds, GMAC/s", INTEGER, [roof.integer_macs / 1e9 for roof in result.roofs]),
        ("float32 multiply-adds, GMAC/s", FLOAT, [roof.float_macs / 1e9 for roof in result.roofs]),
    )
    for ax, (title, color, values) in zip(axes, series, strict=True):
        bars = ax.bar(names, values, color=color, width=0.6)
        ax.bar_label(bars, fmt="{:,.0f}", padding=2)
        ax.set_title(title, loc="left")
        ax.set_xlabel("threads")
        ax.margins(y=0.12)
    figure.suptitle(f"{machine.cpu}, {result.isa}: {machine.sharing}", x=0.01, ha="left", fontsize=10)
    figures.save(figure, path)


class Timed(Protocol):
    """What is drawn of a task, on a processor or a card."""

    @property
    def task(self) -> Task:
        """What was done."""
        ...

    @property
    def tokens_per_s(self) -> Spread:
        """Over the rounds."""
        ...

    @property
    def share(self) -> float:
        """Of the roof."""
        ...

    @property
    def limit(self) -> Limit:
        """Which part of the roof."""
        ...


def latency(path: Path, title: str, rows: Sequence[Timed]) -> None:
    """For each task the share of the roof, coloured by which limit it is of, with its tokens a second."""
    plt = figures.pyplot()
    figure, ax = plt.subplots(figsize=(8, 1.2 + 0.42 * len(rows)), layout="constrained")
    colors = {Limit.MEMORY: READ, Limit.ARITHMETIC: INTEGER}
    names = [row.task.name for row in rows]
    ax.barh(names, [100] * len(rows), color="#eeeeee", height=0.62)
    ax.barh(names, [100 * row.share for row in rows], color=[colors[row.limit] for row in rows], height=0.62)
    for index, row in enumerate(rows):
        text = f"{row.tokens_per_s.median:,.4g} tokens/s, {100 * row.share:.0f} %"
        ax.text(100 * row.share + 1, index, text, va="center")
    ax.invert_yaxis()
    ax.set_xlim(0, max(118, 100 * max(row.share for row in rows) + 30))
    ax.set_xlabel("per cent of the measured roof")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    ax.legend(handles, [f"limit: {limit.value}" for limit in colors], frameon=False, loc="upper right",
              bbox_to_anchor=(1, 1.22), ncols=2)  # fmt: skip
    ax.set_title(title, loc="left", fontsize=10)
    figures.save(figure, path)


def profiles(path: Path, title: str, results: Sequence[StepProfile]) -> None:
    """For each task a bar for each op: its time, and in full colour the time that its limit asks for."""
    plt = figures.pyplot()
    colors = {Limit.MEMORY: READ, Limit.ARITHMETIC: INTEGER}
    heights = [len(result.rows) + 2 for result in results]
    figure, axes = plt.subplots(
        len(results), 1, figsize=(9, 0.6 + 0.24 * sum(heights) + 0.35 * len(results)), layout="constrained",
        gridspec_kw={"height_ratios": heights}, squeeze=False,
    )  # fmt: skip
    for ax, result in zip(axes[:, 0], results, strict=True):
        names = [*(row.name for row in result.rows), REST_NAME]
        times = [*(row.ms for row in result.rows), result.rest_ms]
        ax.barh(names, times, color=REST, height=0.68)
        for index, row in enumerate(result.rows):
            text = f"{row.ms:.3g} ms, {100 * row.part:.0f} %"
            if row.share is not None and row.limit is not None:
                ax.barh([index], [row.ms * row.share], color=colors[row.limit], height=0.68)
                text += f"; {100 * row.share:.0f} % of its roof"
            ax.text(row.ms, index, f" {text}", va="center", fontsize=8)
        ax.text(result.rest_ms, len(names) - 1, f" {result.rest_ms:.3g} ms", va="center", fontsize=8)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.42 * max(times))
        ax.tick_params(axis="y", length=0)
        ax.set_title(f"{result.task.name}: {result.step_ms:.3g} ms a step, {100 * result.share:.0f} % of the roof",
                     loc="left", fontsize=9, fontweight="bold")  # fmt: skip
    axes[-1, 0].set_xlabel("ms of a step")
    shown = {"time taken": REST, "least time: memory": READ, "least time: arithmetic": INTEGER}
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in shown.values()]
    figure.legend(handles, list(shown), frameon=False, loc="outside upper right", ncols=3, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figures.save(figure, path)


def speculation(path: Path, title: str, result: Speculation) -> None:
    """For each task a bar for each method: its speedup, with a mark where it was predicted."""
    plt = figures.pyplot()
    rows = [row for row in result.rows if row.method != OFF.name]
    tasks, methods = list(dict.fromkeys(row.task for row in rows)), list(dict.fromkeys(row.method for row in rows))
    figure, ax = plt.subplots(figsize=(8, 1.4 + 0.3 * max(1, len(rows))), layout="constrained")
    high = 0.8 / max(1, len(methods))
    for row in rows:
        place = tasks.index(row.task) + (methods.index(row.method) - (len(methods) - 1) / 2) * high
        won, end = row.speedup.median >= 1, max(row.speedup.high, row.predicted or 0)
        ax.barh([place], [row.speedup.median], height=0.9 * high, color=READ if won else INTEGER)
        ax.text(end, place, f"  {row.speedup.median:.2f}×  {row.method}", va="center", fontsize=8)
        ax.plot([row.speedup.low, row.speedup.high], [place, place], color="black", linewidth=0.8)
        if row.predicted is not None:
            ax.plot([row.predicted], [place], marker="|", markersize=12, color="black")
    ax.axvline(1, color="black", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(tasks)), tasks)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.45 * max((max(row.speedup.high, row.predicted or 0) for row in rows), default=1.0))
    ax.set_xlabel("speedup; thin line: least to most of the rounds; upright mark: predicted; red: below 1")
    ax.set_title(title, loc="left", fontsize=10)
    figures.save(figure, path)
