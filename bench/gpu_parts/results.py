"""What was measured, what was wanted, and where it is written while the rest is still being measured."""

from __future__ import annotations

import gc
import json
import math
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

MOST_SAID, MOST_SHOWN, MOST_LINES = 1000, 100, 40
"""Characters of an error, in the JSON and in the table; and lines of its traceback."""
Mark = Literal["held", "did not hold", "failed", "skipped", ""]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A bound that a figure must keep: value >= least, or value <= most."""

    least: float = -math.inf
    most: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether the value is within. NaN never is."""
        return self.least <= value <= self.most

    def as_json(self) -> list[float | None]:
        """[least, most], null for none."""
        return [bound if math.isfinite(bound) else None for bound in (self.least, self.most)]

    @staticmethod
    def from_json(bounds: list[float | None]) -> Wanted:
        """What `as_json` gave."""
        least, most = bounds
        return Wanted(-math.inf if least is None else least, math.inf if most is None else most)

    def __str__(self) -> str:
        bounds = [(">=", self.least), ("<=", self.most)]
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if math.isfinite(bound))


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    value: in `unit`; None where nothing came out. share: of the limit that `of` names (1 is as fast as the card can).
    figure: what `wanted` judges, as `judged` calls it; None where the row is told but not judged.
    """

    part: str
    what: str
    value: float | None = None
    unit: str = ""
    share: float | None = None
    of: str = ""
    judged: str = ""
    figure: float | None = None
    wanted: Wanted | None = None
    failed: str = ""
    skipped: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def mark(self) -> Mark:
        """The last column."""
        if self.failed:
            return "failed"
        if self.skipped:
            return "skipped"
        if self.wanted is None or self.figure is None:
            return ""
        return "held" if self.wanted.holds(self.figure) else "did not hold"

    def as_json(self) -> dict[str, Any]:
        """All fields, and the mark."""
        wanted = None if self.wanted is None else self.wanted.as_json()
        return {**asdict(self), "wanted": wanted, "mark": self.mark}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Row:
        """What `as_json` gave."""
        fields = {key: value for key, value in values.items() if key != "mark"}
        wanted = None if fields["wanted"] is None else Wanted.from_json(fields["wanted"])
        return Row(**{**fields, "wanted": wanted})


@dataclass
class Results:
    """All rows and curves so far. With a folder, results.json in it is written anew after every row.

    judging: False where the figures mean nothing (tiny shapes, the interpreter): then rows are told, none is judged.
    """

    machine: dict[str, Any]
    folder: Path | None = None
    judging: bool = True
    rows: list[Row] = field(default_factory=list)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """What each part took."""

    def add(self, row: Row) -> None:
        """One more row."""
        if not self.judging and row.wanted is not None:
            row = replace(row, wanted=None)
        self.rows.append(row)
        self.write()

    def point(self, curve: str, **values: Any) -> None:
        """One more point for a plot."""
        self.curves.setdefault(curve, []).append(values)
        self.write()

    @contextmanager
    def attempt(self, part: str, what: str) -> Iterator[None]:
        """What raises inside becomes a row that says so, and the rest goes on. Ctrl-C is let through."""
        try:
            yield
        except Exception as error:
            said = " ".join(str(error).split())[:MOST_SAID]
            trace = traceback.format_exc().splitlines()[-MOST_LINES:]
            self.add(Row(part, what, failed=f"{type(error).__name__}: {said}", detail={"traceback": trace}))
            error.__traceback__ = None  # its frames hold tensors
            release()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A whole part: as `attempt`, and timed."""
        self.write()
        started = time.perf_counter()
        with self.attempt(name, "the whole part"):
            yield
        self.seconds[name] = round(time.perf_counter() - started, 2)
        self.write()

    @property
    def held(self) -> bool:
        """Whether all that was judged held, and nothing failed."""
        return all(row.mark not in ("did not hold", "failed") for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "held": self.held,
            "machine": self.machine,
            "seconds": self.seconds,
            "rows": [row.as_json() for row in self.rows],
            "curves": self.curves,
        }

    def take(self, path: Path) -> None:
        """Adds what another process has written to a results.json, as far as it came."""
        if not path.exists():
            return
        found = json.loads(path.read_text())
        self.machine.update(found["machine"])
        self.seconds.update(found["seconds"])
        self.curves.update(found["curves"])
        self.rows += [Row.from_json(row) for row in found["rows"]]
        self.write()

    def write(self) -> None:
        """results.json as of now: what was measured is not lost when the rest is."""
        if self.folder is None:
            return
        path = self.folder / "results.json"
        draft = path.with_suffix(".json.part")
        draft.write_text(json.dumps(self.as_json(), indent=1))
        draft.replace(path)


def release() -> None:
    """Gives back what a part that failed held on the card, so that the next one has it."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cells(row: Row) -> tuple[str, ...]:
    share = "" if row.share is None else f"{100 * row.share:.0f} % of {row.of}"
    value = (row.failed or row.skipped)[:MOST_SHOWN] or f"{number(row.value)} {row.unit}".strip()
    wanted = "" if row.wanted is None else f"{row.judged} {row.wanted}".strip()
    came = "" if row.wanted is None else f"{number(row.figure)}"
    mark = f"**{row.mark}**" if row.mark in ("did not hold", "failed") else row.mark
    return row.part, row.what, value, share, wanted, came, mark


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table whose columns line up."""
    head = ("part", "what", "measured", "share", "wanted", "came", "")
    lines = [head, *(_cells(row) for row in rows)]
    clean = [tuple(cell.replace("|", "/") for cell in line) for line in lines]
    widths = [max(len(line[i]) for line in clean) for i in range(len(head))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in clean]  # fmt: skip
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)
