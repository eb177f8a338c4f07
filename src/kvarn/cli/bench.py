"""`kvarn bench`: measure the machine, a model on it, and the same work on another engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvarn.cli import bench_serve, bench_spec
from kvarn.cli.options import ModelArgument, Threads

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure speed, and how far it is from the limits.")

ROOFLINE_EPILOG = """\b
Examples:
  kvarn bench roofline                       at 1, 2, 4, … threads
  kvarn bench roofline --threads 1,2 --json
  kvarn bench roofline --isa avx2 --plot roof.png
"""

LATENCY_EPILOG = """\b
Examples:
  kvarn bench latency smollm2-135m-instruct
  kvarn bench latency model.gguf --threads 8 --batch 1,8,32 --rounds 9
  kvarn bench latency model.gguf --depth 0 --json > latency.json
  kvarn bench latency model.gguf --plot latency.png
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

Rounds = Annotated[int, typer.Option(help="Times that each task is timed, after one that is not counted.")]
Depth = Annotated[
    int | None,
    typer.Option(help="Context of the decode at depth; default: 4096 or what the model has room for; 0: none."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the figures into this PNG file (needs kvarn[plots]).")]
Isa = Annotated[str | None, typer.Option(help="Instruction set: avx512, avx2 or scalar; default: the best there is.")]


MOST_SEQUENCES = 4096

app.command("spec", epilog=bench_spec.EPILOG)(bench_spec.spec_command)
app.command("serve", epilog=bench_serve.EPILOG)(bench_serve.serve_command)


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
    from kvarn.bench.roofline import MAX_THREADS, buffer_bytes, default_threads, measure_rooflines
    from kvarn.cli.progress import work_bar

    this = machine()
    chosen = CpuBackend(isa=isa).isa
    counts = default_threads(this) if threads is None else _numbers("threads", threads, MAX_THREADS)
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


@app.command("latency", epilog=LATENCY_EPILOG)
def latency_command(
    model: ModelArgument,
    prefill: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    decode: Annotated[int, typer.Option(help="Steps of one sequence; others take at most 32.")] = 128,
    batch: Annotated[str, typer.Option(help="Numbers of sequences that decode together.")] = "1,4,16,64",
    depth: Depth = None,
    rounds: Rounds = 5,
    threads: Threads = 0,
    isa: Isa = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Time prompts and decode steps of a model, and say what share of the machine's limits that is.

    Steps of the program are timed, output logits among them, without tokenizer, sampler and scheduler. Bytes are those
    that a step must read at least: weights once, the cache of every sequence.
    """
    from kvarn.backends.cpu import CpuBackend
    from kvarn.bench import latency, report
    from kvarn.bench.machine import machine
    from kvarn.bench.tasks import check_tasks, default_depth, latency_tasks
    from kvarn.cli.progress import resolve_with_progress, work_bar

    for option, value, least in (("prefill", prefill, 1), ("decode", decode, 1), ("rounds", rounds, 1)):
        at_least(option, value, least)
    at_least("depth", depth or 0, 0)
    batches = _numbers("batch", batch, MOST_SEQUENCES)
    backend = CpuBackend(threads=threads, isa=isa)
    if plot is not None:
        from kvarn import figures
        from kvarn.bench import plots

        figures.check(plot)
    this = machine()
    path = resolve_with_progress(model, quiet=as_json or not sys.stderr.isatty())
    sizes = latency.read_sizes(path)
    deep = default_depth(sizes.max_positions) if depth is None else depth
    tasks = latency_tasks(prefill=prefill, decode=decode, depth=deep, batches=batches)
    check_tasks(tasks, sizes.max_positions)
    with work_bar("tasks") as progress:
        result = latency.measure_latency(
            path, sizes, tasks, machine=this, threads=backend.threads, isa=backend.isa, rounds=rounds, progress=progress
        )
    title = f"{path.name}, {backend.threads} threads"
    if plot is not None:
        plots.latency(plot, f"{title}, {this.cpu}, {backend.isa}", result)
    if as_json:
        about = report.about(this, path, backend.isa, backend.threads)
        print(report.to_json({**about, "rounds": rounds, "latency": result}))
    else:
        print(report.latency_text(title, this, backend.isa, result))


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


def _numbers(option: str, text: str, most: int) -> tuple[int, ...]:
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
