"""Results of a card as text tables, and what their JSON says about where they come from."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvarn.backends.cuda.roof import CardRoof
from kvarn.bench.card import CardLatency
from kvarn.bench.report import GIGA, about_file, number, percent, spread, table
from kvarn.config import CudaConfig
from kvarn.planning.sizes import size_text

TERA = 1e12


def about_card(card: str, path: Path, config: CudaConfig) -> dict[str, Any]:
    """What every result on a model says about where it comes from."""
    about = about_file(path)
    about["versions"] |= {name: version(name) for name in ("torch", "triton")}
    return {**about, "card": card, "settings": dataclasses.asdict(config)}


def roof_line(roof: CardRoof) -> str:
    """The limits that shares are of, in one line."""
    return (
        f"roof of the card: {number(roof.copy_bytes / GIGA)} GB/s copied, read and written ones together, "
        f"{number(roof.flops / TERA)} {roof.dtype} TFLOP/s"
    )


def latency_text(title: str, result: CardLatency) -> str:
    """The table of `kvarn bench latency --device cuda`."""
    rows = [
        (row.task.name, spread(row.tokens_per_s), number(row.step_ms), number(row.bytes_per_s / GIGA),
         number(row.flops_per_s / TERA), percent(row.share), row.limit.value)
        for row in result.rows
    ]  # fmt: skip
    columns = ("work", "tokens/s (least–most)", "ms a step", "GB/s", "TFLOP/s", "of the roof", "limit")
    peak = "" if result.peak_bytes is None else f", {size_text(result.peak_bytes)} at most"
    return "\n".join(
        (
            title,
            roof_line(result.roof),
            f"load {result.load_s:.2f} s, {size_text(result.planned_bytes)} planned{peak}, "
            f"median of {len(result.rows[0].seconds)}",
            table(columns, rows),
        )
    )
