"""`kvarn spec`: heads that guess ahead."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvarn.cli.options import ModelArgument, Threads

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Heads that guess ahead for a model.")

TRAIN_EPILOG = """\b
What it does:
  1. The model answers the prompts of --data with kvarn's own engine, and its hidden states are kept in files of bounded
     size (--data-bytes) in the folder --work. That takes about a third of --minutes.
  2. The tokens that it said most often become the draft vocabulary: heads can say no others, and cost little for it.
  3. Heads are trained to say what the model says next. Every 30 seconds a checkpoint is written to --work; the same
     command with --resume goes on from it, with the same result as if it had not been interrupted.
  4. Every 20th prompt is held out: how often guesses are right there is printed, and kept in the file.
\b
--data is a text file with a prompt in each line, or .jsonl with an object in each line that has "prompt", "question",
"text", "turns" (the first is taken) or "messages". The more it is like what the model will be asked, the better;
about 2,000 prompts keep two cores busy for ten minutes.
\b
medusa  heads over the last hidden state, one for each token ahead: least to compute, least right
eagle   a layer over hidden state and token, run again for each token ahead: more to compute, more often right
\b
Examples:
  pip install 'kvarn[train]'
  kvarn spec train smollm2-135m-instruct --kind eagle --data prompts.jsonl --out eagle.safetensors
  kvarn spec train model.gguf --kind medusa --data prompts.txt --out medusa.safetensors --minutes 10
  kvarn serve smollm2-135m-instruct --speculative 'method=eagle,heads=eagle.safetensors,k=auto'
"""


@app.callback()
def root() -> None:
    """Heads that guess ahead for a model (`--speculative`)."""


@app.command("train", epilog=TRAIN_EPILOG)
def train_command(
    model: ModelArgument,
    kind: Annotated[str, typer.Option(help="medusa or eagle.")],
    data: Annotated[Path, typer.Option(help="Prompts: lines of text, or .jsonl.")],
    out: Annotated[Path, typer.Option(help="The file of heads to write, .safetensors.")],
    work: Annotated[Path | None, typer.Option(help="Folder of answers and checkpoints; default: OUT.work.")] = None,
    minutes: Annotated[float, typer.Option(help="Time for all of it.")] = 28.0,
    steps: Annotated[
        int | None, typer.Option(help="Steps of training, whatever time they take; then all prompts are answered.")
    ] = None,
    ahead: Annotated[int, typer.Option(help="Tokens to guess ahead: heads of Medusa, uses of EAGLE's layer.")] = 3,
    draft_vocab: Annotated[int, typer.Option(help="Tokens that heads can say.")] = 4096,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="Of the answers; held-out ones have 0.")] = 0.7,
    data_bytes: Annotated[str, typer.Option(help="Disk space for tokens and hidden states, as 2GiB.")] = "2GiB",
    seqs: Annotated[int, typer.Option(help="Answers at the same time.")] = 16,
    rate: Annotated[float, typer.Option(help="Learning rate at its highest.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of first weights and order.")] = 0,
    threads: Threads = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train Medusa or EAGLE heads on what the model itself says."""
    from kvarn.cli.options import size_option
    from kvarn.cli.progress import resolve_with_progress, share_bar
    from kvarn.config import HEAD_METHODS
    from kvarn.errors import ConfigError
    from kvarn.training.run import TrainSettings, train_heads

    if kind not in HEAD_METHODS:
        raise ConfigError(f"--kind must be {' or '.join(HEAD_METHODS)}, not {kind!r}")
    _need_torch()
    settings = TrainSettings(
        kind, data, out, work or out.with_name(out.name + ".work"), minutes, steps, ahead, draft_vocab, max_tokens,
        temperature, size_option("data-bytes", data_bytes), seqs, threads, seed, rate, resume,
    )  # fmt: skip
    path = resolve_with_progress(model, quiet=as_json or not sys.stderr.isatty())
    with share_bar() as told:
        trained = train_heads(path, settings, told)
    heads = trained.heads
    rates = heads.training.acceptance
    if as_json:
        print(json.dumps({
            "out": str(out), "kind": kind, "texts": trained.texts, "answer_tokens": trained.answer_tokens,
            "draft_vocab": heads.shape.draft_vocab, "coverage": trained.coverage, "steps": heads.training.steps,
            "trained_tokens": heads.training.tokens, "acceptance": list(rates),
        }))  # fmt: skip
        return
    print(f"{trained.texts} answers of {trained.answer_tokens} tokens; {heads.training.steps} steps of training, "
          f"{heads.training.tokens} tokens")  # fmt: skip
    print(f"draft vocabulary: {heads.shape.draft_vocab} tokens, {trained.coverage:.1%} of what held-out answers say")
    said = ", ".join(f"{rate:.1%}" for rate in rates)
    print(f"held-out acceptance, of each guess where those before it are right: {said}")
    together, length = 1.0, 1.0
    for rate_ in rates:
        together *= rate_
        length += together
    print(f"tokens a step where all {len(rates)} are verified: {length:.2f}\nwritten: {out}")


def _need_torch() -> None:
    from importlib.util import find_spec

    from kvarn.errors import ConfigError

    if find_spec("torch") is None:
        raise ConfigError("training needs torch: pip install 'kvarn[train]'")
