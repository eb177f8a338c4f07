"""Results of `kvarn bench serve` as a report: what a terminal, a page, a picture and JSON are made of."""

from __future__ import annotations

from collections.abc import Sequence

from kvarn.bench.serve import tables
from kvarn.bench.serve.compare import ratios
from kvarn.bench.serve.page import Report
from kvarn.bench.serve.point import Bench, Lane, Point
from kvarn.bench.serve.sweep import Sweep
from kvarn.bench.serve.tables import Grid

TITLE = "kvarn bench serve"
CUTS = "times are of the client; a percentile is the smallest value that so many per cent do not exceed"


def about(bench: Bench, lanes: Sequence[Lane], turns: int) -> list[str]:
    """What was measured, in lines."""
    extent = bench.extent
    long = f"{extent.requests} requests" if extent.requests is not None else f"{extent.seconds:g} s"
    before = f" after {extent.warmup:g} s of warm-up" if extent.warmup else ""
    again = f", {turns} turns" if turns > 1 else ""
    lines = [f"{lane.url}: {lane.model}, {lane.client.target.endpoint}; {_scale(lane)}" for lane in lanes]
    return [*lines, f"{bench.dataset.name}; {long}{before}{again}; seed {bench.seed}"]


def _scale(lane: Lane) -> str:
    scale = lane.scale
    if not scale.measured:
        return f"{scale.per_word:g} tokens a word assumed"
    return f"{scale.per_word:.2f} tokens a word, {scale.overhead:.0f} around each prompt"


def one_load(bench: Bench, lane: Lane, points: Sequence[Point], late_limit: float) -> Report:
    """Of one server under one load, in one or several turns."""
    return Report(
        title=f"{TITLE}: {points[0].offer}",
        lead=_verdict(bench, points),
        about=about(bench, [lane], len(points)),
        grids=[("Times", tables.times_grid(points)), ("Rates", tables.rates_grid(points)), *_errors(points)],
        doubts=tables.doubts(points, late_limit),
        notes=[tables.client_line(points), CUTS, *_interval_note(points)],
    )


def two_servers(
    bench: Bench, lanes: Sequence[Lane], points: Sequence[Sequence[Point]], late_limit: float
) -> Report:
    """Of two servers under the same load, in turns."""
    first, second = points
    found = ratios(first, second)
    grids: list[tuple[str, Grid]] = [("Second to first", tables.ratios_grid(found))]
    for name, several in zip(("First", "Second"), points, strict=True):
        grids += [(f"{name}: times", tables.times_grid(several)), *_errors(several, f"{name}: failed requests")]
    throughput = next((ratio for ratio in found if ratio.figure.name == "output tokens/s"), None)
    lead = "no figure could be compared" if throughput is None else (
        f"the second server makes {throughput.ratio:.2f} times the output tokens/s of the first"
    )  # fmt: skip
    return Report(
        title=f"{TITLE}: two servers, {first[0].offer}",
        lead=lead,
        about=about(bench, lanes, len(first)),
        grids=grids,
        doubts=tables.doubts([*first, *second], late_limit),
        notes=[tables.client_line([*first, *second]), CUTS, *_interval_note(first)],
    )


def saturation(bench: Bench, lane: Lane, found: Sweep, late_limit: float) -> Report:
    """Of a search for the highest load."""
    return Report(
        title=f"{TITLE}: the highest load at which {bench.slo}",
        lead=_highest(found),
        about=about(bench, [lane], 1),
        grids=[("Loads", tables.curve_grid(found)), *_errors(found.points)],
        doubts=tables.doubts(found.points, late_limit),
        notes=[tables.client_line(found.points), CUTS],
    )


def _highest(found: Sweep) -> str:
    if found.best is None:
        return "no load was found at which the SLO holds"
    summary = found.best.summary
    rates = (
        f"{tables.number(summary.requests_per_s)} requests/s, {tables.number(summary.prompt_tokens_per_s)} prompt and "
        f"{tables.number(summary.output_tokens_per_s)} output tokens/s"
    )
    more = "" if found.bracketed else "; more was not tried"
    return f"the SLO holds up to {found.best.offer}: {rates}{more}"


def _verdict(bench: Bench, points: Sequence[Point]) -> str:
    output = sum(point.summary.output_tokens_per_s for point in points) / len(points)
    rate = sum(point.summary.requests_per_s for point in points) / len(points)
    said = f"{tables.number(rate)} requests/s, {tables.number(output)} output tokens/s"
    if not bench.slo.limits:
        failed = sum(point.summary.failed for point in points)
        return f"{said}; {failed} failed" if failed else said
    broken = next((point.broken for point in points if point.broken), "")
    return f"{said}; {f'the SLO does not hold: {broken}' if broken else f'the SLO holds: {bench.slo}'}"


def _errors(points: Sequence[Point], heading: str = "Failed requests") -> list[tuple[str, Grid]]:
    grid = tables.errors_grid(points)
    return [] if grid is None else [(heading, grid)]


def _interval_note(points: Sequence[Point]) -> list[str]:
    return [f"± is half of a 95 % confidence interval over {len(points)} turns"] if len(points) > 1 else []
