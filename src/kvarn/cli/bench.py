"""`kvarn bench`: measure the machine, a model on it, and the same work on another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure speed, and how far it is from the limits.")

ROOFLINE_EPILOG = """\b
Examples:
  kvarn bench roofline                       at 1, 2, 4, … threads
  kvarn bench roofline --threads 1,2 --json
  kvarn bench roofline --isa avx2 --plot roof.png
"""

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the figures into this PNG file (needs kvarn[plots]).")]
Isa = Annotated[str | None, typer.Option(help="Instruction set: avx512, avx2 or scalar; default: the best there is.")]


@app.callback()
def root() -> None:
    """Measure speed, and how far it is from the limits."""


@app.command("roofline", epilog=ROOFLINE_EPILOG)
def roofline_command(
    threads: Annotated[str | None, typer.Option(help="Numbers of threads, with commas between.")] = None,
    isa: Isa = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Measure what the machine can do: bytes read, and multiply-adds of bytes and floats, a second.

    Takes about a second for each number of threads. A model's decode can be no faster than its weights are read;
    its prefill no faster than its multiply-adds are done.
    """
    from kvarn.backends.cpu import CpuBackend
    from kvarn.bench import report
    from kvarn.bench.machine import machine
    from kvarn.bench.roofline import buffer_bytes, default_threads, measure_rooflines
    from kvarn.cli.progress import work_bar

    this = machine()
    chosen = CpuBackend(isa=isa).isa
    counts = default_threads(this) if threads is None else _numbers("threads", threads)
    if plot is not None:
        from kvarn.bench import plots

        plots.check(plot)
    with work_bar("roofline", quiet=as_json) as progress:
        result = measure_rooflines(chosen, counts, buffer_bytes(this), progress)
    if plot is not None:
        plots.rooflines(plot, this, result)
    if as_json:
        print(report.to_json({"machine": this, "roofline": result}))
    else:
        print(report.rooflines_text(this, result))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """A list such as "1,2,4". Raises ConfigError naming the option."""
    from kvarn.errors import ConfigError

    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--{option} must be whole numbers with commas between, not {text!r}") from None
    if min(numbers) < 1:
        raise ConfigError(f"--{option} must be at least 1, not {min(numbers)}")
    return numbers
