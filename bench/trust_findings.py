"""What `bench/trust.py` finds: its rows, whether each held, and both as tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import trust_bad
from trust_garbage import BadTally
from trust_load import Crowd, Tally
from trust_watch import Watch, tracebacks

from kvarn.bench.serve.ranks import Distribution

WARM_UP = 0.25
"""Share of the time after which memory must be flat."""
LEAST_JUDGED = 120.0
"""Seconds of load below which a slope of memory says nothing."""
FLAT = 0.02
"""Share of its memory that the server may grow by after the warm-up."""
REFUSED_SECONDS, LIVE_SECONDS = 0.050, 0.100
INJECTED = "a step fails because a test wants it"


@dataclass
class Row:
    """A row of the table. held: None where it is told but not judged."""

    tried: str
    came_out: str
    held: bool | None
    timed: bool = False
    """Whether that was decided by a time, which other work on the machine can spoil."""


@dataclass
class Findings:
    """All rows, and what the server could do."""

    rows: list[Row] = field(default_factory=list)
    bad: dict[str, BadTally] = field(default_factory=dict)

    def add(self, tried: str, came_out: str, held: bool | None = None, *, timed: bool = False) -> None:
        """One more row."""
        self.rows.append(Row(tried, came_out, held, timed))

    def as_json(self) -> dict[str, object]:
        """The same for --json."""
        bad = {name: {**vars(tally), "statuses": dict(tally.statuses)} for name, tally in self.bad.items()}
        return {"held": self.held, "rows": [asdict(row) for row in self.rows], "bad": bad}

    @property
    def held(self) -> bool:
        """Whether all of them did."""
        return all(row.held is not False for row in self.rows)


def judge(findings: Findings, crowd: Crowd, watched: Watch, flat_since: float, seconds: float, log: Path) -> None:
    """The rows about the load as a whole. seconds: how long it was."""
    lost = crowd.good.lost + crowd.limited.lost
    findings.add("accepted requests lost", f"{lost.total()} {dict(lost.most_common(5)) or ''}".strip(), not lost)
    refused = Distribution.of([*crowd.good.refused, *crowd.limited.refused])
    if refused is not None:
        said = f"{refused.count:,}: P50 {1e3 * refused.p50:.1f} ms, P99 {1e3 * refused.p99:.1f} ms"
        findings.add("time to be refused (429, 503)", said, refused.p99 < REFUSED_SECONDS, timed=True)
    _judge_limits(findings, crowd.limited)
    _judge_bad(findings)
    findings.add("clients that left, stalled, were killed", f"{crowd.left}, {crowd.stalled}, {crowd.killed}")
    live = Distribution.of(watched.live_seconds)
    assert live is not None
    said = f"{live.count:,} probes: P99 {1e3 * live.p99:.1f} ms, most {1e3 * live.most:.0f} ms"
    findings.add("/health/live under it", said, live.p99 < LIVE_SECONDS, timed=True)
    findings.add("probes of it that failed", str(watched.live_failures), not watched.live_failures)
    late = Distribution.of(crowd.late)
    if late is not None:
        said = f"P50 {1e3 * late.p50:.1f} ms, P99 {1e3 * late.p99:.1f} ms; {crowd.cpu / seconds:.0%} of a core"
        findings.add("requests sent too late by the clients themselves", said)
    slope, middle = watched.growth(flat_since)
    grown = slope * (1 - WARM_UP) * seconds / 60
    said = f"{slope:+.2f} MiB a minute of {middle:,.0f}, {watched.most_open_files} open files at most"
    findings.add("memory after the warm-up", said, grown < FLAT * middle if seconds >= LEAST_JUDGED else None)
    raised = [line for line in tracebacks(log) if INJECTED not in line]
    findings.add("tracebacks in the log", f"{len(raised)} {raised[:3] or ''}".strip(), not raised)


def _judge_limits(findings: Findings, limited: Tally) -> None:
    said = f"{limited.answered} answered, {len(limited.refused)} refused"
    findings.add("a key over its limits", said, len(limited.refused) > 0 and limited.answered > 0)


def _judge_bad(findings: Findings) -> None:
    prompt = {bad.name for bad in trust_bad.kinds("") if bad.prompt}
    sent = sum(tally.sent for tally in findings.bad.values())
    wrong = {name: (dict(tally.statuses), tally.said[-300:]) for name, tally in findings.bad.items() if tally.wrong}
    findings.add(f"{sent:,} bad requests of {len(findings.bad)} kinds", f"not refused: {wrong or 'none'}", not wrong)
    times = Distribution.of(second for name in prompt & findings.bad.keys() for second in findings.bad[name].seconds)
    if times is not None:
        said = f"P50 {1e3 * times.p50:.1f} ms, P99 {1e3 * times.p99:.1f} ms"
        findings.add("time until a bad request is refused", said, times.p99 < REFUSED_SECONDS, timed=True)


def markdown(findings: Findings, title: str) -> str:
    """Two tables: what was tried, and every kind of bad request."""
    marks = {True: "held", False: "**did not hold**", None: ""}
    lines = [f"# {title}", "", "| what was tried | what came out | |", "|---|---|---|"]
    lines += [f"| {row.tried} | {row.came_out.replace('|', '/')} | {marks[row.held]} |" for row in findings.rows]
    lines += ["", "| bad request | sent | answers | P99 ms |", "|---|---|---|---|"]
    for name, tally in sorted(findings.bad.items()):
        counts = tally.statuses.most_common()
        answers = ", ".join(f"{'closed' if status == 'None' else status}: {count}" for status, count in counts)
        times = Distribution.of(tally.seconds)
        lines.append(f"| {name} | {tally.sent} | {answers} | {'' if times is None else f'{1e3 * times.p99:.1f}'} |")
    return "\n".join(lines) + "\n"
