"""`kvarn models`: what can be run, what is here already, and whose packed weights are kept."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated

import typer

EPILOG = """\b
Examples:
  kvarn models
  kvarn models --json
  kvarn models --remove-packed smollm2-135m-instruct     or: all
\b
The first start with a model writes its weights, packed for the CPU, to the cache folder, from where later starts map
them. KVARN_PACKED_CACHE_BYTES bounds that folder (20 GB unless set; 0: nothing is written).
"""


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
    packed: Annotated[bool, typer.Option("--packed", help="List packed weights only.")] = False,
    remove_packed: Annotated[
        str | None, typer.Option(metavar="NAME|all", help="Remove the packed weights of a model, or of all.")
    ] = None,
) -> None:
    """List the known models, whether they have been pulled, and the packed weights that are kept."""
    if remove_packed is not None:
        _remove(remove_packed)
        return
    if not packed:
        _known(as_json)
    if packed or not as_json:
        _packed(as_json)


def _known(as_json: bool) -> None:
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
    columns = ("name", "family", "params", "type", "licence", "size", "here")
    _table(columns, [
        (e.name, e.family, e.parameters, e.quantization, e.licence, f"{e.bytes / 1e6:,.0f} MB",
         "yes" if e.pulled else "no")
        for e in rows
    ])  # fmt: skip
    print("\nAny .gguf file and any folder with config.json and safetensors of a supported family runs too.")


def _packed(as_json: bool) -> None:
    from kvarn.weights.packed_cache import limit_bytes, packed_models

    rows = packed_models()
    if as_json:
        print(json.dumps(
            [{"name": m.name, "bytes": m.bytes, "last_used": m.last_used, "path": str(m.path)} for m in rows]
        ))  # fmt: skip
        return
    total = sum(m.bytes for m in rows)
    print(f"\nPacked weights: {total / 1e6:,.0f} MB of at most {limit_bytes(None) / 1e6:,.0f} MB")
    if rows:
        times = (datetime.fromtimestamp(m.last_used).strftime("%Y-%m-%d %H:%M") for m in rows)
        _table(
            ("name", "size", "last used"),
            [(m.name, f"{m.bytes / 1e6:,.0f} MB", when) for m, when in zip(rows, times, strict=True)],
        )


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, padding=(0, 1))
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _remove(name: str) -> None:
    from kvarn.weights.packed_cache import packed_models, remove

    removed = remove(name)
    if not removed and name != "all":
        known = ", ".join(m.name for m in packed_models()) or "there are none"
        raise typer.BadParameter(f"no packed weights of {name!r} ({known})", param_hint="--remove-packed")
    for model in removed:
        print(f"removed {model.name} ({model.bytes / 1e6:,.1f} MB)")
