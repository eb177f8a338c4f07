"""`kvarn bench latency`: a model's prompts and decode steps, on the processor or on a card."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvarn.cli.options import ComputeType, Device, ModelArgument, Threads, WeightForm, chosen_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvarn.bench.latency import Sizes
    from kvarn.bench.tasks import Task
    from kvarn.config import CudaConfig

EPILOG = """\b
Examples:
  kvarn bench latency smollm2-135m-instruct
  kvarn bench latency model.gguf --threads 8 --batch 1,8,32 --rounds 9
  kvarn bench latency model.gguf --depth 0 --json > latency.json
  kvarn bench latency model.gguf --plot latency.png
  kvarn bench latency model.gguf --device cuda --weights int4 --prefill 2048
"""

Rounds = Annotated[int, typer.Option(help="Times that each task is timed, after one that is not counted.")]
Depth = Annotated[
    int | None,
    typer.Option(help="Context of the decode at depth; default: 4096 or what the model has room for; 0: none."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the figures into this PNG file (needs kvarn[plots]).")]
Isa = Annotated[str | None, typer.Option(help="Instruction set: avx512, avx2 or scalar; default: the best there is.")]
MOST_SEQUENCES = 4096


def latency_command(
    model: ModelArgument,
    prefill: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    decode: Annotated[int, typer.Option(help="Steps of one sequence; others take at most 32.")] = 128,
    batch: Annotated[str, typer.Option(help="Numbers of sequences that decode together.")] = "1,4,16,64",
    depth: Depth = None,
    rounds: Rounds = 5,
    threads: Threads = 0,
    isa: Isa = None,
    device: Device = "cpu",
    dtype: ComputeType = None,
    weights: WeightForm = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Time prompts and decode steps of a model, and say what share of the machine's limits that is.

    Steps of the program are timed, output logits among them, without tokenizer, sampler and scheduler. Bytes are those
    that a step must read at least: weights once, the cache of every sequence. With --device cuda limits are the card's,
    and steps follow one another as they do in the engine, each reading the tokens that the one before chose there.
    """
    from kvarn.bench.tasks import CARD_CHUNK, CHUNK, check_tasks, default_depth, latency_tasks
    from kvarn.cli.bench import at_least, numbers
    from kvarn.cli.progress import resolve_with_progress

    for option, value, least in (("prefill", prefill, 1), ("decode", decode, 1), ("rounds", rounds, 1)):
        at_least(option, value, least)
    at_least("depth", depth or 0, 0)
    batches = numbers("batch", batch, MOST_SEQUENCES)
    _, cuda = chosen_device(device, dtype, weights)
    on_card = device != "cpu"
    if on_card:
        check_card(cuda.device, threads=threads, isa=isa)
    if plot is not None:
        from kvarn import figures

        figures.check(plot)
    path = resolve_with_progress(model, quiet=as_json or not sys.stderr.isatty())
    from kvarn.bench.latency import read_sizes

    sizes = read_sizes(path)
    deep = default_depth(sizes.max_positions) if depth is None else depth
    chunk = CARD_CHUNK if on_card else CHUNK
    tasks = latency_tasks(prefill=prefill, decode=decode, depth=deep, batches=batches, chunk=chunk)
    check_tasks(tasks, sizes.max_positions)
    if on_card:
        _on_card(path, sizes, tasks, cuda, rounds, as_json, plot)
    else:
        _on_processor(path, sizes, tasks, threads, isa, rounds, as_json, plot)


def check_card(device: str, *, threads: int, isa: str | None) -> None:
    """Raises ConfigError for options that are a processor's, and where there is no card."""
    from kvarn.backends.cuda import check_device
    from kvarn.errors import ConfigError

    for option, given in (("threads", threads != 0), ("isa", isa is not None)):
        if given:
            raise ConfigError(f"--{option} is for a CPU, not for --device cuda")
    check_device(device)


def _on_processor(
    path: Path, sizes: Sizes, tasks: Sequence[Task], threads: int, isa: str | None, rounds: int, as_json: bool,
    plot: Path | None,
) -> None:  # fmt: skip
    from kvarn.backends.cpu import CpuBackend
    from kvarn.bench import latency, report
    from kvarn.bench.machine import machine
    from kvarn.cli.progress import work_bar

    backend, this = CpuBackend(threads=threads, isa=isa), machine()
    with work_bar("tasks") as progress:
        result = latency.measure_latency(
            path, sizes, tasks, machine=this, threads=backend.threads, isa=backend.isa, rounds=rounds, progress=progress
        )
    title = f"{path.name}, {backend.threads} threads"
    if plot is not None:
        from kvarn.bench import plots

        plots.latency(plot, f"{title}, {this.cpu}, {backend.isa}", result.rows)
    if as_json:
        about = report.about(this, path, backend.isa, backend.threads)
        print(report.to_json({**about, "rounds": rounds, "latency": result}))
    else:
        print(report.latency_text(title, this, backend.isa, result))


def _on_card(
    path: Path, sizes: Sizes, tasks: Sequence[Task], cuda: CudaConfig, rounds: int, as_json: bool, plot: Path | None
) -> None:
    from kvarn.backends.cuda.card import card_name
    from kvarn.backends.cuda.clock import Clock
    from kvarn.backends.cuda.roof import measure_roof
    from kvarn.bench import card_report, report
    from kvarn.bench.card import measure_card_latency
    from kvarn.cli.progress import work_bar

    clock, card = Clock(cuda.device), card_name(cuda.device)
    with work_bar("tasks") as progress:
        result = measure_card_latency(
            path, sizes, tasks, cuda,
            clock=clock, probe=lambda: measure_roof(clock, cuda.dtype), rounds=rounds, progress=progress,
        )  # fmt: skip
    title = f"{path.name}: {card}, {cuda.dtype}, weights {cuda.weights}"
    if plot is not None:
        from kvarn.bench import plots

        plots.latency(plot, title, result.rows)
    if as_json:
        about = card_report.about_card(card, path, cuda)
        print(report.to_json({**about, "rounds": rounds, "latency": result}))
    else:
        print(card_report.latency_text(title, result))
