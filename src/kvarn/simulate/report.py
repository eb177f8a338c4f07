"""Runs side by side: as a table, as JSON, as a picture. rich and matplotlib are imported when they are asked for."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarn import figures
from kvarn.simulate.results import Results
from kvarn.simulate.settings import label

if TYPE_CHECKING:
    from rich.table import Table

COLORS = ("#2a6f97", "#c8553d", "#7a9e3c", "#8d6a9f", "#d1a04e", "#4f5d75", "#5aa9a3", "#b56576")


def results_table(runs: Sequence[Results]) -> Table:
    """A row for each run; columns that say nothing of any run are left out."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run")
    rows = [_row(run) for run in runs]
    shown = [name for name in rows[0] if any(row[name] not in ("", "0", "0 %") for row in rows)]
    for name in shown:
        table.add_column(name, justify="right")
    names = [label(run.settings, [other.settings for other in runs]) for run in runs]
    for name, row in zip(names, rows, strict=True):
        table.add_row(name, *(row[column] for column in shown))
    return table


def _row(run: Results) -> dict[str, str]:
    return {
        "tokens/s": f"{run.tokens_per_s:,.1f}",
        "TTFT s p50 / p95 / p99": _seconds(run.ttft),
        "ITL ms p50 / p95 / p99": _seconds(run.itl, 1e3),
        "end to end s p50 / p99": _seconds(run.e2e, 1, (50, 99)),
        "hits": f"{100 * run.hit_rate:.0f} %",
        "preempted": f"{run.preemptions:,}",
        "computed twice": f"{run.recomputed_tokens:,}",
        "saved": f"{run.saved_tokens:,}",
        "loaded": f"{run.loaded_tokens:,}",
        "refused": f"{run.refused:,}",
        "of them late": f"{run.late:,}",
        "busy": f"{100 * run.utilization:.0f} %",
        "batch": f"{run.mean_batch:.1f}",
        "fairness": "" if run.fairness is None else f"{run.fairness.jain:.2f}",
        "most : least": "" if run.fairness is None else f"{run.fairness.max_to_min:.1f}",
    }


def _seconds(values: Mapping[int, float] | None, unit: float = 1, shares: Sequence[int] = (50, 95, 99)) -> str:
    return "" if values is None else " / ".join(f"{unit * values[share]:,.3g}" for share in shares)


def to_json(runs: Sequence[Results], about: Mapping[str, Any]) -> str:
    """One object; numbers that are not finite become null."""
    items = [_finite(dataclasses.asdict(run)) for run in runs]
    return json.dumps({**about, "runs": items})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(path: Path, title: str, runs: Sequence[Results]) -> None:
    """Bars for each run: throughput, and P50, P95 and P99 of the times to the first token and between tokens."""
    plt = figures.pyplot()
    names = [label(run.settings, [other.settings for other in runs]) for run in runs]
    height = 1.5 + 0.5 * len(runs)
    figure, axes = plt.subplots(1, 3, figsize=(12, height), layout="constrained", sharey=True)
    places = range(len(runs))
    bars = axes[0].barh(places, [run.tokens_per_s for run in runs], color=COLORS[0], height=0.6)
    axes[0].bar_label(bars, fmt="{:,.0f}", padding=3)
    axes[0].set_title("output tokens/s", loc="left")
    axes[0].set_yticks(places, names)
    axes[0].invert_yaxis()
    axes[0].margins(x=0.15)
    for ax, heading, values, unit in (
        (axes[1], "time to first token, s", [run.ttft for run in runs], 1.0),
        (axes[2], "time between tokens, ms", [run.itl for run in runs], 1e3),
    ):
        _percentile_bars(ax, values, unit)
        ax.set_title(heading, loc="left")
    figure.legend(*axes[1].get_legend_handles_labels(), frameon=False, loc="outside upper right", ncols=3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figures.save(figure, path)


def _percentile_bars(ax: Any, values: Sequence[Mapping[int, float] | None], unit: float) -> None:
    for offset, (share, color) in enumerate(zip((50, 95, 99), ("#9ec1d4", "#5793b5", "#2a6f97"), strict=True)):
        lengths = [0.0 if value is None else unit * value[share] for value in values]
        bars = ax.barh([place + 0.22 * (offset - 1) for place in range(len(values))], lengths, height=0.2, color=color,
                       label=f"P{share}")  # fmt: skip
        ax.bar_label(bars, labels=[f"{length:,.3g}" for length in lengths], padding=3, fontsize=7)
    positive = [unit * share for value in values if value for share in value.values() if share > 0]
    if positive and max(positive) > 50 * min(positive):
        ax.set_xscale("log")
    ax.margins(x=0.15)
