"""Results as text tables that can be pasted, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvarn import __version__
from kvarn.bench.compare import Comparison
from kvarn.bench.latency import Latency
from kvarn.bench.machine import Machine
from kvarn.bench.profile import REST, StepProfile, slowest
from kvarn.bench.roofline import Roof, Rooflines
from kvarn.bench.statistics import Spread
from kvarn.bench.steps import MeasuredStep, by_shape

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


def about(machine: Machine, path: Path, isa: str, threads: int) -> dict[str, Any]:
    """What every result on a model says about where it comes from."""
    return {**about_file(path), "machine": machine, "isa": isa, "threads": threads}


def about_file(path: Path) -> dict[str, Any]:
    """Of which file it is, when it was measured, and with what."""
    return {
        "model": path.name,
        "file_bytes": path.stat().st_size if path.is_file() else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"kvarn": __version__, "python": platform.python_version()},
    }


def machine_line(machine: Machine, isa: str) -> str:
    """Processor, cores and memory in one line, and one more where others may disturb what is measured."""
    line = f"{machine.cpu}, {machine.sharing}, {machine.memory_bytes / (1 << 30):.0f} GiB, {isa}"
    if machine.busy:
        line += f"\nthe machine was at work before this (load {machine.load}): what still runs disturbs the figures"
    return line


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


def spread(values: Spread) -> str:
    """Median, and from where to where the values go."""
    return f"{number(values.median)} ({number(values.low)}–{number(values.high)})"


def roof_line(roof: Roof) -> str:
    """The limits that shares are of, in one line."""
    return (
        f"roof at {roof.threads} thread{'' if roof.threads == 1 else 's'}: {number(roof.read_bytes / GIGA)} GB/s read, "
        f"{number(roof.integer_macs / GIGA)} int8 and {number(roof.float_macs / GIGA)} float32 GMAC/s"
    )


def latency_text(model: str, machine: Machine, isa: str, result: Latency) -> str:
    """The table of `kvarn bench latency`."""
    rows = [
        (row.task.name, spread(row.tokens_per_s), number(row.step_ms), number(row.bytes_per_s / GIGA),
         number(row.macs_per_s / GIGA), percent(row.share), row.limit.value)
        for row in result.rows
    ]  # fmt: skip
    columns = ("work", "tokens/s (least–most)", "ms a step", "GB/s", "GMAC/s", "of the roof", "limit")
    return "\n".join(
        (
            f"{model}: {machine_line(machine, isa)}",
            roof_line(result.roof),
            f"load {result.load_s:.2f} s, peak RSS {result.peak_rss / (1 << 20):,.0f} MiB, "
            f"median of {len(result.rows[0].seconds)}",
            table(columns, rows),
        )
    )


def steps_text(model: str, machine: Machine, isa: str, measured: Sequence[MeasuredStep]) -> str:
    """The table of `kvarn bench steps`: a step of each size; all of them are in its JSON."""
    rows = [
        (name, number(1e3 * step.seconds), number(step.shape.num_tokens / step.seconds))
        for name, step in by_shape(measured)
    ]
    head = f"{model}: {machine_line(machine, isa)}\n{len(measured)} steps"
    return f"{head}\n{table(('step', 'ms', 'tokens/s'), rows)}"


def comparison_text(model: str, machine: Machine, isa: str, result: Comparison) -> str:
    """The table of `kvarn bench compare`."""
    names = [engine.name for engine in result.engines]
    rows = [(row.kvarn.task.name, *(spread(row.rates[name]) for name in names), f"{row.ratio:.2f}×")
            for row in result.rows]  # fmt: skip
    shares = [
        (row.task.name, number(row.step_ms), number(row.bytes_per_s / GIGA), number(row.macs_per_s / GIGA),
         percent(row.share), row.limit.value)
        for row in (compared.kvarn for compared in result.rows)
    ]  # fmt: skip
    engines = [
        (engine.name, f"{engine.load_s:.2f} s", f"{engine.peak_rss / (1 << 20):,.0f} MiB") for engine in result.engines
    ]
    return "\n".join(
        (
            f"{model}: {machine_line(machine, isa)}",
            roof_line(result.roof),
            f"median of {len(result.rows[0].kvarn.seconds)} in turns; ratio: kvarn to the faster setting of the peer",
            "",
            table(("tokens/s (least–most)", *names, "ratio"), rows),
            "",
            table(("kvarn", "ms a step", "GB/s", "GMAC/s", "of the roof", "limit"), shares),
            "",
            table(("engine", "load", "peak RSS"), engines),
            "",
            *(f"{engine.name}: {engine.info}" for engine in result.engines),
        )
    )


def profile_text(model: str, machine: Machine, isa: str, by: str, profiles: Sequence[StepProfile]) -> str:
    """The tables of `kvarn profile`."""
    parts = [f"{model}: {machine_line(machine, isa)}"]
    parts += [_profile_table(by, profile) for profile in profiles]
    return "\n\n".join(parts)


def _profile_table(by: str, profile: StepProfile) -> str:
    steps = profile.task.num_steps
    rows: list[Sequence[str]] = [
        (row.name, str(row.stages), number(row.ms), percent(row.part), number(row.cost.bytes / steps / 1e6),
         number(row.activation_bytes / steps / 1e6), number(row.cost.macs / steps / 1e6),
         number(row.bytes_per_s / GIGA), number(row.macs_per_s / GIGA), percent(row.share),
         row.limit.value if row.limit else "–", percent(row.waiting))
        for row in profile.rows
    ]  # fmt: skip
    rows.append((REST, "", number(profile.rest_ms), percent(profile.rest_ms / profile.step_ms), *[""] * 8))
    rows.append(("a step", str(sum(row.stages for row in profile.rows)), number(profile.step_ms), "100 %",
                 *[""] * 5, percent(profile.share), "", ""))  # fmt: skip
    columns = (by, "stages", "ms", "part", "MB", "rows MB", "MMAC", "GB/s", "GMAC/s", "of its roof", "limit", "waits")
    gain = slowest(profile)
    lines = [f"{profile.task.name}; {roof_line(profile.roof)}", table(columns, rows)]
    if gain is not None and gain.share is not None:
        least = gain.ms * gain.share
        lines.append(f"furthest from its limit: {gain.name}, {number(gain.ms)} ms where {number(least)} would do")
    return "\n".join(lines)
