"""Results as text tables that can be pasted, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvarn.bench.machine import Machine
from kvarn.bench.roofline import Rooflines

GIGA = 1e9


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    lines = []
    for row in (columns, tuple("-" * width for width in widths), *rows):
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits or so, enough to see a difference that means something."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def percent(share: float | None) -> str:
    """A share of 1 as per cent; a dash for None."""
    return "–" if share is None else f"{100 * share:.0f} %"


def to_json(results: Mapping[str, Any]) -> str:
    """One JSON object; records become objects."""
    return json.dumps(results, default=_plain)


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def machine_line(machine: Machine, isa: str) -> str:
    """Processor, cores and memory in one line."""
    return f"{machine.cpu}, {machine.sharing}, {machine.memory_bytes / (1 << 30):.0f} GiB, {isa}"


def rooflines_text(machine: Machine, result: Rooflines) -> str:
    """The table of `kvarn bench roofline`."""
    first = result.roofs[0]
    rows = [
        (str(roof.threads), number(roof.read_bytes / GIGA), number(roof.integer_macs / GIGA),
         number(roof.float_macs / GIGA), f"{roof.integer_macs / first.integer_macs:.2f}×",
         number(roof.integer_macs / roof.read_bytes))
        for roof in result.roofs
    ]  # fmt: skip
    gain = f"int8 against {first.threads}"
    columns = ("threads", "read GB/s", "int8 GMAC/s", "float32 GMAC/s", gain, "int8 MACs a byte")
    return f"{machine_line(machine, result.isa)}\n{table(columns, rows)}"
