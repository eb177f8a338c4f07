"""`kvarn bench spec`: what guessing tokens ahead brings on tasks, measured and predicted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvarn.cli.options import ModelArgument, Threads

if TYPE_CHECKING:
    from kvarn.bench.spec_lane import Method, Setup
    from kvarn.bench.spec_prompts import TaskPrompt, TaskText

EPILOG = """\b
Examples:
  kvarn bench spec MODEL --data spec_bench/question.jsonl --data HumanEval.jsonl.gz
  kvarn bench spec MODEL --data question.jsonl --methods 'method=ngram;method=ngram,k=4;method=draft,model=SMALL'
  kvarn bench spec MODEL --data question.jsonl --prompts 4 --batch 4 --json --plot spec.png
"""
DEFAULT_METHODS = "method=ngram,k=auto;method=ngram,k=4;method=lookahead"
MOST = {"prompts": 100_000, "max-tokens": 1 << 20, "rounds": 1000, "batch": 4096}


def spec_command(
    model: ModelArgument,
    data: Annotated[
        list[Path],
        typer.Option(
            help="Prompts: a file of Spec-Bench or HumanEval, or any .jsonl or .jsonl.gz with `turns`, `prompt` or "
            "`question`, and `category`. May be given several times."
        ),
    ],
    methods: Annotated[
        str, typer.Option(help="Ways to guess, as --speculative takes them, with ; between; `off` is always there.")
    ] = DEFAULT_METHODS,
    prompts: Annotated[int, typer.Option(help="Prompts of each task, from all over it.")] = 8,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens of an answer at most.")] = 128,
    batch: Annotated[int, typer.Option(help="Prompts that come together.")] = 1,
    rounds: Annotated[int, typer.Option(help="Times that each is timed, after one that is not counted.")] = 3,
    raw: Annotated[bool, typer.Option("--raw", help="Prompts as plain text, not as a chat's first message.")] = False,
    threads: Threads = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures into this PNG file (needs kvarn[plots]).")] = None,
) -> None:
    """Answer prompts of several tasks with ways to guess tokens ahead, in turns, and say what each brings and why.

    For each task and way: how often guesses are right, tokens a step, the speedup measured and the one predicted.
    Answers are greedy, and must be those without guesses; where one is not, that is said and the status is 1.
    """
    from kvarn.backends.cpu import CpuBackend
    from kvarn.bench import report, spec, spec_prompts, spec_report
    from kvarn.bench.machine import machine
    from kvarn.cli.progress import resolve_with_progress, work_bar

    given = {"prompts": prompts, "max-tokens": max_tokens, "rounds": rounds, "batch": batch}
    for option, value in given.items():
        _check_number(option, value)
    chosen = parse_methods(methods)
    if plot is not None:
        from kvarn import figures
        from kvarn.bench import plots

        figures.check(plot)
    texts = spec_prompts.read_texts(data, prompts)
    backend, this = CpuBackend(threads=threads), machine()
    path = resolve_with_progress(model, quiet=as_json or not sys.stderr.isatty())
    setup, fitting = _fit(path, texts, raw=raw, threads=threads, batch=batch, max_tokens=max_tokens)
    with work_bar("answers") as progress:
        result = spec.measure_speculation(setup, fitting, chosen, rounds=rounds, progress=progress)
    left_out = len(texts) - len(fitting)
    title = f"{path.name}, {backend.threads} threads"
    if plot is not None:
        plots.speculation(plot, f"{title}, {this.cpu}, {backend.isa}, batch {batch}", result)
    if as_json:
        about = report.about(this, path, backend.isa, backend.threads)
        ran = {"rounds": rounds, "batch": batch, "max_tokens": max_tokens, "raw": raw, "left_out": left_out}
        print(report.to_json({**about, **ran, "data": [file.name for file in data], "speculation": result}))
    else:
        print(spec_report.speculation_text(title, this, backend.isa, _ran(given, len(fitting), left_out), result))
    if any(row.num_equal < row.num_prompts for row in result.rows):
        raise typer.Exit(1)


def parse_methods(text: str) -> list[Method]:
    """Ways to guess with ; between. Raises ConfigError naming --methods or the setting."""
    from kvarn.bench.spec import OFF
    from kvarn.bench.spec_lane import Method
    from kvarn.cli.speculative import speculative_config
    from kvarn.errors import ConfigError

    methods: dict[str, Method] = {}
    for part in (part.strip() for part in text.split(";")):
        method = OFF if part == OFF.name else Method(_name(part), speculative_config(part))
        if method.name in methods:
            raise ConfigError(f"--methods: {method.name} is given twice")
        methods[method.name] = method
    if not any(method.config for method in methods.values()):
        raise ConfigError("--methods must have one beside off")
    return list(methods.values())


def _name(text: str) -> str:
    """A method's settings without what is the same for all, and without folders: `ngram k=4`."""
    settings = (setting.strip().partition("=") for setting in text.split(","))
    return " ".join(
        value if name == "method" else f"{name}={Path(value).name if name in ('model', 'heads') else value}"
        for name, _, value in settings
    )


def _fit(
    path: Path, texts: list[TaskText], *, raw: bool, threads: int, batch: int, max_tokens: int
) -> tuple[Setup, list[TaskPrompt]]:
    """The prompts that the model has room for, answers and all, and what engines must be like for them."""
    from kvarn.bench import spec_prompts
    from kvarn.bench.spec_lane import Setup
    from kvarn.errors import ConfigError
    from kvarn.models import load_model
    from kvarn.text import load_tokenizer
    from kvarn.weights import open_model

    with open_model(path) as files:
        most = load_model(files).config.max_positions - max_tokens
        encoded = spec_prompts.encode(texts, load_tokenizer(files), raw=raw)
    fitting = [prompt for prompt in encoded if 0 < len(prompt.token_ids) <= most]
    if not fitting:
        raise ConfigError(f"--max-tokens {max_tokens} leaves {max(most, 0)} tokens for a prompt, and all are longer")
    longest = max(len(prompt.token_ids) for prompt in fitting)
    return Setup(path, threads, batch, max_tokens, longest + max_tokens), fitting


def _ran(given: dict[str, int], num_prompts: int, left_out: int) -> str:
    text = (
        f"{_count(num_prompts)}, batch {given['batch']}, greedy answers of at most {given['max-tokens']} tokens; "
        f"median of {given['rounds']} in turns"
    )
    return text + (f"; {_count(left_out)} left out: longer than the model has room for" if left_out else "")


def _count(prompts: int) -> str:
    return f"{prompts} prompt{'' if prompts == 1 else 's'}"


def _check_number(option: str, value: int) -> None:
    from kvarn.errors import ConfigError

    if not 1 <= value <= MOST[option]:
        raise ConfigError(f"--{option} must be between 1 and {MOST[option]}, not {value}")
