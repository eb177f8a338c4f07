"""`kvarn trace`: what the engine did, from a file that `kvarn serve --trace-file` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Say what the engine did, step by step.")

SHOW_EPILOG = """\b
Examples:
  kvarn serve --trace-file trace.json        records; the file is written when the server ends
  kvarn trace show trace.json
Or open trace.json at https://ui.perfetto.dev (it is read in your browser and sent nowhere).
"""
EXPLAIN_EPILOG = """\b
Examples:
  kvarn trace explain trace.json chatcmpl-1f0c      the id of an answer, or the begin of it
"""

File = Annotated[Path, typer.Argument(help="A file that `kvarn serve --trace-file` wrote.")]


@app.callback()
def root() -> None:
    """Say what the engine did, step by step."""


@app.command("show", epilog=SHOW_EPILOG)
def show_command(file: File) -> None:
    """Sum a trace up: how full steps were, where the time went, who waited longest."""
    from kvarn.tracing import read_trace
    from kvarn.tracing.summary import summary

    print(summary(read_trace(file)))


@app.command("explain", epilog=EXPLAIN_EPILOG)
def explain_command(
    file: File, request: Annotated[str, typer.Argument(help="The request's id, or the begin of it.")]
) -> None:
    """Tell one request's life: why it waited, what it hit, when it was preempted, what made its tokens late."""
    from kvarn.tracing import read_trace
    from kvarn.tracing.explain import explain

    print(explain(read_trace(file), request))
