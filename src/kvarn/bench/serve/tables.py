"""Results as tables, for a terminal and for a page, as sentences, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvarn.bench.serve.compare import RATES, Ratio
from kvarn.bench.serve.point import Point
from kvarn.bench.serve.ranks import Distribution
from kvarn.bench.serve.sweep import Sweep
from kvarn.bench.statistics import Interval

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {"ttft": "TTFT, ms", "tpot": "TPOT, ms", "itl": "ITL, ms", "e2e": "end to end, ms"}
COLUMNS: tuple[tuple[str, Callable[[Distribution], float]], ...] = (
    ("mean", lambda times: times.mean),
    ("P50", lambda times: times.p50),
    ("P95", lambda times: times.p95),
    ("P99", lambda times: times.p99),
    ("most", lambda times: times.most),
)
MAX_SAID = 120


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: the first column to the left, the others to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> Table:
        """For a terminal."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def times_grid(points: Sequence[Point]) -> Grid:
    """Times of requests that were answered whole; of several turns the mean, and how far its 95 % interval goes."""
    rows = []
    for name, title in TITLES.items():
        rows.append([title, *_cells([point.summary.times[name] for point in points])])
    rows.append(["sent late, ms", *_cells([point.summary.lag for point in points])])
    return Grid(["", *(name for name, _ in COLUMNS)], rows)


def _cells(turns: Sequence[Distribution | None]) -> list[str]:
    known = [times for times in turns if times is not None]
    return [_interval([1e3 * of(times) for times in known]) if known else "–" for _, of in COLUMNS]


def rates_grid(points: Sequence[Point]) -> Grid:
    """Rates over the measured time."""
    rows = [["requests/s sent", _interval([point.summary.offered_per_s for point in points])]]
    rows += [[figure.name, _interval([figure.of(point.summary) or 0.0 for point in points])] for figure in RATES]
    rows.append(["good requests", _share(points)])
    cached, prompt = (sum(getattr(p.summary, f"{kind}_tokens") for p in points) for kind in ("cached", "prompt"))
    if cached:
        rows.append(["prompt tokens found in a cache", f"{cached:,} of {prompt:,}"])
    return Grid(["", "a second"], rows)


def _share(points: Sequence[Point]) -> str:
    good, all_ = sum(point.summary.good for point in points), sum(point.summary.requests for point in points)
    return f"{good:,} of {all_:,}"


def errors_grid(points: Sequence[Point]) -> Grid | None:
    """Failed requests by kind, with what was said first; None where there are none."""
    rows: dict[str, tuple[int, str]] = {}
    for point in points:
        for kind, count in point.summary.errors.items():
            before, said = rows.get(kind, (0, point.summary.details.get(kind, "")))
            rows[kind] = before + count, said
    if not rows:
        return None
    return Grid(["failed", "requests", "said"], [[kind, f"{n:,}", said[:MAX_SAID]] for kind, (n, said) in rows.items()])


def curve_grid(sweep: Sweep) -> Grid:
    """A row for each point of a sweep, by load."""
    columns = ["load", "requests", "requests/s", "output tokens/s", "goodput", "TTFT ms P50 / P95 / P99",
               "ITL ms P50 / P95 / P99", "SLO"]  # fmt: skip
    rows = []
    for point in sweep.curve:
        summary = point.summary
        rows.append([
            point.offer, f"{summary.requests:,}", number(summary.requests_per_s), number(summary.output_tokens_per_s),
            number(summary.goodput), _three(summary.times["ttft"]), _three(summary.times["itl"]),
            point.broken or ("holds, the highest" if point is sweep.best else "holds"),
        ])  # fmt: skip
    return Grid(columns, rows)


def ratios_grid(ratios: Sequence[Ratio]) -> Grid:
    """A row for each figure of two servers."""
    rows = []
    for ratio in ratios:
        interval = "" if ratio.low is None or ratio.high is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
        cells = (number(ratio.first), number(ratio.second), f"{ratio.ratio:.2f}×", interval, ratio.better)
        rows.append([ratio.figure.name, *cells])
    return Grid(["", "first", "second", "second to first", "95 % interval", "better"], rows)


def doubts(points: Sequence[Point], late_limit: float) -> list[str]:
    """What makes figures doubtful. late_limit: seconds that the client may be late, P99 of its own lag."""
    said = []
    for point in points:
        summary = point.summary
        late = max((times.p99 for times in (summary.lag, summary.client.late) if times is not None), default=0.0)
        if late > late_limit:
            said.append(
                f"{point.offer}: the client itself was late, P99 {1e3 * late:.1f} ms (limit {1e3 * late_limit:g}), at "
                f"{100 * summary.client.cpu_share:.0f} % of a processor: times are too long by so much; give it a "
                "machine or a core of its own"
            )
        if summary.completed and not summary.counted:
            said.append(
                f"{point.offer}: the server does not say how many tokens answers have (stream_options.include_usage): "
                "each event counts as one"
            )
    few = sum(point.summary.requests < 100 for point in points)
    if few:
        said.append(f"{few} of {len(points)} measurements have fewer than 100 requests: P99 is the slowest of them")
    return list(dict.fromkeys(said))


def client_line(points: Sequence[Point]) -> str:
    """What measuring took."""
    cpu = sum(point.summary.client.cpu_seconds for point in points)
    seconds = sum(point.summary.client.seconds for point in points)
    tokens = sum(answer.output_tokens for point in points for answer in point.answers)
    each = f", {1e6 * cpu / tokens:.0f} µs a token" if tokens else ""
    return f"the client took {100 * cpu / seconds:.1f} % of a processor{each}" if seconds else ""


def _three(times: Distribution | None) -> str:
    return "–" if times is None else " / ".join(number(1e3 * times.at(percentile)) for percentile in (50, 95, 99))


def _interval(values: Sequence[float]) -> str:
    interval = Interval.of(values)
    return number(interval.mean) + ("" if interval.half is None else f" ± {number(interval.half)}")


def number(value: float) -> str:
    """Three digits or more."""
    if not value or not math.isfinite(value):
        return "0" if not value else "–"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 3)}f}"


def plain(value: Any) -> Any:
    """Records as objects, without the single answers; numbers that are not finite as null."""
    if isinstance(value, Point):
        return {"load": value.offer, "size": value.size, "holds": value.holds, "broken": value.broken,
                **plain(value.summary)}  # fmt: skip
    if isinstance(value, Ratio):
        return {"figure": value.figure.name, "first": value.first, "second": value.second, "ratio": value.ratio,
                "low": value.low, "high": value.high, "better": value.better}  # fmt: skip
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(results: Mapping[str, Any]) -> str:
    """One object."""
    return json.dumps(plain(results))
