"""`kvarn models`: what can be run, and what is here already."""

from __future__ import annotations

import json
from typing import Annotated

import typer

EPILOG = """\b
Examples:
  kvarn models
  kvarn models --json
"""


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the known models and whether they have been pulled."""
    from kvarn.weights.catalog import models

    rows = models()
    if as_json:
        fields = ("name", "family", "parameters", "quantization", "licence", "bytes", "sha256", "pulled")
        print(
            json.dumps(
                [{**{f: getattr(e, f) for f in fields}, "path": str(e.path) if e.pulled else None} for e in rows]
            )
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "name", "family", "params", "type", "licence", "size", "here", box=None, pad_edge=False, padding=(0, 1)
    )
    for e in rows:
        size = f"{e.bytes / 1e6:,.0f} MB"
        table.add_row(e.name, e.family, e.parameters, e.quantization, e.licence, size, "yes" if e.pulled else "no")
    Console().print(table)
    print("\nAny .gguf file and any folder with config.json and safetensors of a supported family runs too.")
