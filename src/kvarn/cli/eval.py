"""`kvarn eval`: measure what a model's output is worth."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure a model's quality.")

PERPLEXITY_EPILOG = """\b
Examples:
  kvarn eval perplexity smollm2-135m-instruct --text wiki.test.raw
  kvarn eval perplexity model.gguf --text wiki.test.raw --context 512 --chunks 40 --json
  kvarn eval perplexity model.gguf --text book.txt --backend reference --chunks 2
"""


@app.callback()
def root() -> None:
    """Measure a model's quality."""


@app.command("perplexity", epilog=PERPLEXITY_EPILOG)
def perplexity_command(
    model: Annotated[str, typer.Argument(help="A name from `kvarn models`, a .gguf file, or a folder.")],
    text: Annotated[Path, typer.Option("--text", help="A UTF-8 text file.", exists=True, dir_okay=False)],
    context: Annotated[int, typer.Option(help="Tokens in a chunk; the second half of each is scored.")] = 512,
    chunks: Annotated[int | None, typer.Option(help="Only the first so many chunks.", min=1)] = None,
    backend: Annotated[str, typer.Option(help="cpu, or reference (plain NumPy, slow, exact weights).")] = "cpu",
    kv_dtype: Annotated[str, typer.Option(help="KV cache type: float16 or float32.")] = "float16",
    threads: Annotated[int, typer.Option(help="Compute threads; 0: one for each physical core.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity of a text: how well the model predicts it (lower is better).

    The text is tokenized once and cut into chunks of one context; the second half of each chunk is scored, as
    llama-perplexity does, so figures are comparable.
    """
    from kvarn.cli.progress import resolve_with_progress, work_bar
    from kvarn.errors import ConfigError
    from kvarn.eval.perplexity import perplexity
    from kvarn.eval.session import open_session

    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{text}: not UTF-8 at byte {error.start}") from error
    if kv_dtype not in ("float16", "float32"):
        raise ConfigError(f"kv-dtype must be float16 or float32, not {kv_dtype!r}")
    path = resolve_with_progress(model, quiet=as_json or not sys.stderr.isatty())
    opened = open_session(path, context=context, backend=backend, threads=threads, kv_dtype=kv_dtype)
    with opened as session, work_bar("chunks") as progress:
        result = perplexity(session, content, chunks=chunks, progress=progress)
    if as_json:
        print(
            json.dumps(
                {
                    "model": model,
                    "text": str(text),
                    "backend": backend,
                    "kv_dtype": kv_dtype,
                    "context": result.context,
                    "chunks": result.chunks,
                    "tokens": result.tokens,
                    "perplexity": result.perplexity,
                    "standard_error": result.standard_error,
                }
            )
        )
    else:
        print(
            f"perplexity {result.perplexity:.4f} ± {result.standard_error:.4f}   "
            f"({result.tokens} tokens in {result.chunks} chunks of {result.context}, back-end {backend})"
        )
