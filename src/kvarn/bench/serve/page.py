"""The report as one HTML file that asks nobody for anything: style, tables and picture are in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from kvarn.bench.serve.tables import Grid
from kvarn.errors import ConfigError

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 80rem; margin: 2rem auto;
       padding: 0 1.25rem }
h1 { font-size: 1.5rem; margin: 0 0 .25rem } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem }
.lead { font-size: 1.15rem; margin: .75rem 0; padding: .6rem .9rem; background: #eef4f8;
        border-left: 4px solid #2a6f97 }
.about { color: #566573; margin: 0 } .doubt { color: #8a3b12; margin: .25rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #e3e8ed; white-space: nowrap }
th { font-weight: 600; border-bottom: 2px solid #aab7c4 }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
td:last-child { white-space: normal; min-width: 9rem }
.wide { overflow-x: auto } svg { width: 100%; height: auto; margin-top: 1rem }
footer { color: #7b8794; font-size: .85rem; margin-top: 2.5rem }
""".strip()
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True, slots=True)
class Report:
    """What a run of the command has to say. lead: its result in a sentence. about: what was measured."""

    title: str
    lead: str
    about: Sequence[str]
    grids: Sequence[tuple[str, Grid]]
    """With their headings."""
    doubts: Sequence[str] = ()
    notes: Sequence[str] = ()


def html(report: Report, pictures: Sequence[str]) -> str:
    """The page. What came from servers or options is escaped; pictures, <svg> elements, are taken as they are."""
    parts = [f"<h1>{escape(report.title)}</h1>"]
    parts += [f'<p class="about">{escape(line)}</p>' for line in report.about]
    parts.append(f'<p class="lead">{escape(report.lead)}</p>')
    parts += [f'<p class="doubt">⚠ {escape(line)}</p>' for line in report.doubts]
    for heading, grid in report.grids:
        parts += [f"<h2>{escape(heading)}</h2>", _table(grid)]
    parts += pictures
    parts.append("<footer>" + "<br>".join(escape(line) for line in report.notes) + "</footer>")
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(report.title)}</title>'
        f"<style>{STYLE}</style>"
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def write(path: Path, report: Report, pictures: Sequence[str]) -> None:
    """Writes the page. Raises ConfigError where that cannot be."""
    try:
        path.write_text(html(report, pictures), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html: {path} cannot be written: {error.strerror}") from error


def check(path: Path) -> None:
    """Raises ConfigError where no page could be written: before the work, not after it."""
    if path.suffix.lower() != ".html":
        raise ConfigError(f"--html must name an .html file, not {path.name!r}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--html: there is no folder {path.absolute().parent}")


def _table(grid: Grid) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in grid.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in grid.rows)
    return f'<div class="wide"><table><tr>{head}</tr>\n{rows}</table></div>'
