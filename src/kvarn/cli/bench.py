"""`kvarn bench`: measure the machine, a model on it, and the same work on another engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvarn.cli import bench_latency, bench_serve, bench_spec
from kvarn.cli.bench_latency import AsJson, Depth, Isa, Plot, Rounds, check_card
from kvarn.cli.options import Device, ModelArgument, Threads, chosen_device

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure speed, and how far it is from the limits.")

ROOFLINE_EPILOG = """\b
Examples:
  kvarn bench roofline                       at 1, 2, 4, … threads
  kvarn bench roofline --threads 1,2 --json
  kvarn bench roofline --isa avx2 --plot roof.png
  kvarn bench roofline --device cuda
"""

STEPS_EPILOG = """\b
Examples:
  kvarn bench steps smollm2-135m-instruct
  kvarn bench steps model.gguf --json > steps.json      what `kvarn simulate --cost` takes
"""

COMPARE_EPILOG = """\b
Examples:
  python -m venv peer && peer/bin/pip install llama-cpp-python      builds it for this machine, about ten minutes
  kvarn bench compare model.gguf --peer llama.cpp --peer-python peer/bin/python
  kvarn bench compare model.gguf --peer openvino --peer-python ov/bin/python --rounds 3 --json
"""

app.command("latency", epilog=bench_latency.EPILOG)(bench_latency.latency_command)
app.command("spec", epilog=bench_spec.EPILOG)(bench_spec.spec_command)
app.command("serve", epilog=bench_serve.EPILOG)(bench_serve.serve_command)


@app.callback()
def root() -> None:
    """Measure speed, and how far it is from the limits."""


@app.command("roofline", epilog=ROOFLINE_EPILOG)
def roofline_command(
    threads: Annotated[str | None, typer.Option(help="Numbers of threads, with commas between.")] = None,
    isa: Isa = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Measure what the machine can do: bytes read, and multiply-adds of bytes and floats, a second.

    Takes about a second for each number of threads. A model's decode can be no faster than its weights are read;
    its prefill no faster than its multiply-adds are done. Of a card: bytes copied, and bfloat16 operations.
    """
    _, cuda = chosen_device(device, None, None)
    if device != "cpu":
        _card_roofline(cuda.device, threads, isa, as_json, plot)
        return
    from kvarn.backends.cpu import CpuBackend
    from kvarn.bench import report
    from kvarn.bench.machine import machine
    from kvarn.bench.roofline import MAX_THREADS, buffer_bytes, default_threads, measure_rooflines
    from kvarn.cli.progress import work_bar

    this = machine()
    chosen = CpuBackend(isa=isa).isa
    counts = default_threads(this) if threads is None else numbers("threads", threads, MAX_THREADS)
    if plot is not None:
        from kvarn import figures
        from kvarn.bench import plots

        figures.check(plot)
    with work_bar("roofline") as progress:
        result = measure_rooflines(chosen, counts, buffer_bytes(this), progress)
    if plot is not None:
        plots.rooflines(plot, this, result)
    if as_json:
        print(report.to_json({"machine": this, "roofline": result}))
    else:
        print(report.rooflines_text(this, result))


def _card_roofline(device: str, threads: str | None, isa: str | None, as_json: bool, plot: Path | None) -> None:
    from kvarn.errors import ConfigError

    if threads is not None or plot is not None:
        raise ConfigError(f"--{'threads' if threads is not None else 'plot'} is for a CPU, not for --device cuda")
    check_card(device, threads=0, isa=isa)
    from kvarn.backends.cuda.card import card_name
    from kvarn.backends.cuda.clock import Clock
    from kvarn.backends.cuda.roof import measure_roof
    from kvarn.bench import card_report, report

    roof = measure_roof(Clock(device))
    card = card_name(device)
    print(report.to_json({"card": card, "roofline": roof}) if as_json else f"{card}\n{card_report.roof_line(roof)}")


@app.command("steps", epilog=STEPS_EPILOG)
def steps_command(
    model: ModelArgument,
    tokens: Annotated[int, typer.Option(help="Tokens of the largest step.")] = 512,
    seqs: Annotated[int, typer.Option(help="Sequences of the largest batch.")] = 64,
    rounds: Rounds = 3,
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Time steps of many shapes in the engine itself, for a cost model: see `kvarn simulate`."""
    from kvarn.backends.cpu import CpuBackend
    from kvarn.bench import report, steps
    from kvarn.bench.machine import machine
    from kvarn.cli.progress import resolve_with_progress, work_bar

    for option, value, least in (("tokens", tokens, 2), ("seqs", seqs, 1), ("rounds", rounds, 1)):
        at_least(option, value, least)
    backend = CpuBackend(threads=threads)
    this = machine()
    path = resolve_with_progress(model, quiet=as_json or not sys.stderr.isatty())
    with work_bar("steps") as progress:
        measured = steps.measure_steps(
            path, threads=threads, max_num_tokens=tokens, max_num_seqs=seqs, rounds=rounds, progress=progress
        )
    if as_json:
        about = report.about(this, path, backend.isa, backend.threads)
        print(report.to_json({**about, "rounds": rounds, "steps": measured, "kv": steps.measure_kv(path)}))
    else:
        print(report.steps_text(f"{path.name}, {backend.threads} threads", this, backend.isa, measured))


@app.command("compare", epilog=COMPARE_EPILOG)
def compare_command(
    model: ModelArgument,
    peer: Annotated[str, typer.Option(help="llama.cpp (llama-cpp-python) or openvino (openvino-genai).")],
    peer_python: Annotated[Path, typer.Option(help="The Python of the environment that the peer is installed in.")],
    only: Annotated[str | None, typer.Option(help="Only work whose name contains this.")] = None,
    depth: Depth = None,
    rounds: Rounds = 5,
    threads: Threads = 0,
    isa: Isa = None,
    as_json: AsJson = False,
) -> None:
    """Do the same work on the same file with kvarn and another engine, in turns, and print ratios.

    The peer runs with each of its settings that matters (llama.cpp: flash attention on and off); the fastest counts.
    """
    from kvarn.backends.cpu import CpuBackend
    from kvarn.bench import compare, latency, report
    from kvarn.bench.machine import machine
    from kvarn.bench.tasks import check_tasks, compare_tasks, default_depth
    from kvarn.cli.progress import resolve_with_progress, work_bar
    from kvarn.errors import ConfigError

    at_least("rounds", rounds, 1)
    at_least("depth", depth or 0, 0)
    found = compare.find_peer(peer)
    backend = CpuBackend(threads=threads, isa=isa)
    path = resolve_with_progress(model, quiet=as_json or not sys.stderr.isatty())
    if not path.is_file():
        raise ConfigError(f"model: peers read .gguf files, and {path} is none")
    sizes = latency.read_sizes(path)
    every = compare_tasks(default_depth(sizes.max_positions) if depth is None else depth)
    tasks = [task for task in every if only is None or only in task.name]
    if not tasks:
        raise ConfigError(f"--only {only!r} is in no name; there are: {', '.join(task.name for task in every)}")
    check_tasks(tasks, sizes.max_positions)
    this = machine()
    with work_bar("tasks") as progress:
        result = compare.measure_comparison(
            path, sizes, tasks, peer_name=peer, peer=found, peer_python=str(peer_python), machine=this,
            threads=backend.threads, isa=backend.isa, rounds=rounds, progress=progress,
        )  # fmt: skip
    if as_json:
        about = report.about(this, path, backend.isa, backend.threads)
        print(report.to_json({**about, "rounds": rounds, "comparison": result}))
    else:
        print(report.comparison_text(f"{path.name}, {backend.threads} threads", this, backend.isa, result))


def at_least(option: str, value: int, least: int) -> None:
    """Raises ConfigError naming the option and its limit."""
    from kvarn.errors import ConfigError

    if value < least:
        raise ConfigError(f"--{option} must be at least {least}, not {value}")


def numbers(option: str, text: str, most: int) -> tuple[int, ...]:
    """A list such as "1,2,4" of numbers from 1 to `most`, each once. Raises ConfigError naming the option."""
    from kvarn.errors import ConfigError

    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--{option} must be whole numbers with commas between, not {text!r}") from None
    for number in numbers:
        if not 1 <= number <= most:
            raise ConfigError(f"--{option} must be between 1 and {most}, not {number}")
    return tuple(dict.fromkeys(numbers))
