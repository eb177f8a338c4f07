"""The tables of `kvarn bench spec`."""

from __future__ import annotations

from collections.abc import Sequence

from kvarn.bench.machine import Machine
from kvarn.bench.report import machine_line, spread, table
from kvarn.bench.spec import OFF, Row, Speculation

NOTABLE = 0.05
"""By how much a cause must change the speedup to be named."""
LEGEND = (
    "α: guesses that were right, of those before which all were. tokens: of a sequence in a step.",
    "speedup: time of off / time, prompts among it. counted: the same if each step took the median of all steps of as",
    "many rows, so without the machine's moods. predicted: (1 - α^(K+1)) / ((1 - α) (1 + cK)).",
)
WHY_LEGEND = (
    "K: tokens guessed ahead in a step; rows: computed for a sequence in a step. 1+cK: the step against one without",
    "guesses; guessing: its part of that. speedup = predicted × lengths × prompts. lengths: tokens a step against what",
    "α gives with K guesses in every step. prompts: what computing the prompts, without guesses, leaves of it.",
)


def speculation_text(model: str, machine: Machine, isa: str, about: str, result: Speculation) -> str:
    """All of them. about: what was run, in one line."""
    lines = [f"{model}: {machine_line(machine, isa)}", about, *equal_lines(result.rows), "", _speedups(result.rows)]
    guessed = [row for row in result.rows if row.why is not None]
    if guessed:
        lines += [*LEGEND, "", _whys(guessed), *WHY_LEGEND]
    if mixed := [row for row in result.rows if len(row.sources) > 1]:
        lines += ["", _by_source(mixed)]
    if result.row_costs:
        costs = ", ".join(f"{rows}: {cost:.2f}×" for rows, cost in result.row_costs.items())
        lines += ["", f"a step of so many rows against one of {result.plain_rows} without guesses: {costs}"]
    return "\n".join(lines)


def equal_lines(rows: Sequence[Row]) -> list[str]:
    """Whether answers are those without guesses; where they are not, which."""
    guessing = [row for row in rows if row.method != OFF.name]
    wrong = [row for row in guessing if row.num_equal < row.num_prompts]
    if not guessing:
        return []
    if not wrong:
        return ["answers: equal to those without guesses, token by token, in every round"]
    return [
        f"answers DIFFER from those without guesses: {row.task}, {row.method}: "
        f"{row.num_prompts - row.num_equal} of {row.num_prompts}"
        for row in wrong
    ]


def note(row: Row) -> str:
    """Why a measured speedup is not the predicted one, or is below 1, in a few words."""
    if row.why is None:
        return "" if row.method == OFF.name else "nothing guessed"
    causes = [f"{row.why.rows:.1f} rows cost {row.why.step_cost:.2f}×"] if row.speedup.median < 1 else []
    for name, factor in (("lengths", row.why.lengths), ("prompts", row.why.prompts)):
        if abs(factor - 1) > NOTABLE:
            causes.append(f"{name} {factor:.2f}×")
    return ", ".join(causes)


def _speedups(rows: Sequence[Row]) -> str:
    cells = [
        (row.task, row.method, _times(row.acceptance, ""), "–" if row.length is None else f"{row.length:.2f}",
         spread(row.tokens_per_s), f"{row.speedup.median:.2f}× ({row.speedup.low:.2f}–{row.speedup.high:.2f})",
         _times(row.counted), _times(row.predicted), note(row))
        for row in rows
    ]  # fmt: skip
    columns = ("task", "method", "α", "tokens", "tokens/s (least–most)", "speedup", "counted", "predicted", "note")
    return table(columns, cells)


def _whys(rows: Sequence[Row]) -> str:
    cells = [
        (row.task, row.method, f"{why.guesses:.2f}", f"{why.rows:.2f}", f"{why.cost:.3f}", _times(why.step_cost),
         _times(why.drafting), _times(why.decode_speedup), _times(why.lengths), _times(why.prompts))
        for row in rows if (why := row.why) is not None
    ]  # fmt: skip
    columns = ("why", "method", "K", "rows", "c", "1+cK", "guessing", "decode only", "lengths", "prompts")
    return table(columns, cells)


def _by_source(rows: Sequence[Row]) -> str:
    cells = [
        (row.task, row.method, one.name, str(one.draft_tokens), str(one.accepted_tokens), f"{one.acceptance:.2f}")
        for row in rows
        for one in row.sources
    ]
    return table(("guesses", "method", "source", "verified", "right", "α"), cells)


def _times(value: float | None, sign: str = "×") -> str:
    return "–" if value is None else f"{value:.2f}{sign}"
