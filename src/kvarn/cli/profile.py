"""`kvarn profile`: where a step's time goes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvarn.cli.options import ModelArgument, Threads

EPILOG = """\b
Examples:
  kvarn profile smollm2-135m-instruct
  kvarn profile model.gguf --by layer --depth 0
  kvarn profile model.gguf --prefill 128 --batch 32 --plot profile.png
  kvarn profile model.gguf --json > profile.json
"""


def command(
    model: ModelArgument,
    prefill: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    batch: Annotated[int, typer.Option(help="Sequences of the batched decode.")] = 16,
    depth: Annotated[
        int | None,
        typer.Option(help="Context of the decode at depth; default: 4096 or what the model has room for; 0: none."),
    ] = None,
    by: Annotated[str, typer.Option(help="A row for each op, or for each layer.")] = "op",
    rounds: Annotated[int, typer.Option(help="Rounds, of which the median one is shown.")] = 5,
    threads: Threads = 0,
    isa: Annotated[str | None, typer.Option(help="Instruction set: avx512, avx2 or scalar; default: the best.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures into this PNG file (needs kvarn[plots]).")] = None,
) -> None:
    """Say where the time of a step goes, op by op, and how far each op is from the machine's limits.

    A prompt, decode steps of one and of several sequences, and decode at depth. Times are those of the step that
    serves, taken by native counters that are off otherwise.
    """
    from kvarn.backends.cpu import CpuBackend
    from kvarn.bench import report
    from kvarn.bench.latency import read_sizes
    from kvarn.bench.machine import machine
    from kvarn.bench.profile import profile, profile_tasks
    from kvarn.bench.roofline import RoofProbe
    from kvarn.bench.stepper import open_stepper
    from kvarn.bench.tasks import check_tasks, default_depth
    from kvarn.cli.bench import at_least
    from kvarn.cli.progress import resolve_with_progress, work_bar
    from kvarn.errors import ConfigError

    for option, value in (("prefill", prefill), ("batch", batch), ("rounds", rounds)):
        at_least(option, value, 1)
    at_least("depth", depth or 0, 0)
    if by not in ("op", "layer"):
        raise ConfigError(f"--by must be op or layer, not {by!r}")
    backend = CpuBackend(threads=threads, isa=isa)
    if plot is not None:
        from kvarn import figures
        from kvarn.bench import plots

        figures.check(plot)
    this = machine()
    path = resolve_with_progress(model, quiet=as_json or not sys.stderr.isatty())
    sizes = read_sizes(path)
    tasks = profile_tasks(
        prefill=prefill, batch=batch, depth=default_depth(sizes.max_positions) if depth is None else depth
    )
    check_tasks(tasks, sizes.max_positions)
    with work_bar("rounds") as progress:
        probe = RoofProbe(backend.isa, backend.threads, this)
        with open_stepper(path, backend, tasks) as stepper:
            results = profile(
                stepper, sizes, tasks, probe, by="layer" if by == "layer" else "op", rounds=rounds, progress=progress
            )
    title = f"{path.name}, {backend.threads} threads"
    if plot is not None:
        plots.profiles(plot, f"{title}, {this.cpu}, {backend.isa}", results)
    if as_json:
        about = report.about(this, path, backend.isa, backend.threads)
        print(report.to_json({**about, "rounds": rounds, "by": by, "profiles": results}))
    else:
        print(report.profile_text(title, this, backend.isa, by, results))
