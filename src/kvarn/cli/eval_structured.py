"""`kvarn eval structured`: which JSON schemas are taken, and whether what comes out is valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvarn.eval.structured import StructuredResult
    from kvarn.text import Tokenizer

STRUCTURED_EPILOG = """\b
Examples:
  kvarn eval structured jsonschemabench/
  kvarn eval structured schemas.jsonl --vocabulary smollm2-135m-instruct --limit 200
  kvarn eval structured my.schema.json --json
"""
SHOWN = 20
"""Reasons and schemas that are printed."""


def structured_command(
    schemas: Annotated[
        list[Path],
        typer.Argument(help="Schemas: .json files, .jsonl files with one a line, folders of them.", exists=True),
    ],
    vocabulary: Annotated[
        str | None, typer.Option(help="A model whose vocabulary is used; default: one of single bytes.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many schemas, evenly chosen.", min=1)] = None,
    guess: Annotated[bool, typer.Option("--guess", help="With tokens guessed ahead; it changes nothing.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights and samples.")] = 0,
    max_grammar_seconds: Annotated[float, typer.Option(help="To compile a grammar; then it is refused.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with every schema.")] = False,
) -> None:
    """Which JSON schemas are taken, and whether what comes out is valid.

    Each is compiled as the server does it; under each that is accepted a tiny model of random weights answers at
    temperature 1, and the jsonschema package (`pip install kvarn[eval]`) checks the answer.
    """
    from kvarn.cli.progress import work_bar
    from kvarn.config import GrammarConfig, SpeculativeConfig
    from kvarn.errors import ConfigError
    from kvarn.eval.structured import Status, evaluate_structured, read_schemas

    try:
        import jsonschema  # noqa: F401 (that it is there)
    except ImportError:
        raise ConfigError("`kvarn eval structured` needs the jsonschema package: pip install kvarn[eval]") from None
    pairs = [pair for path in schemas for pair in read_schemas(path)]
    if limit is not None and limit < len(pairs):
        pairs = [pairs[place * len(pairs) // limit] for place in range(limit)]
    with work_bar("schemas") as progress:
        result = evaluate_structured(
            pairs,
            tokenizer=None if vocabulary is None else _tokenizer(vocabulary),
            grammar=GrammarConfig(max_grammar_seconds=max_grammar_seconds),
            speculative=SpeculativeConfig(k=6) if guess else None,
            seed=seed,
            progress=progress,
        )
    if as_json:
        print(json.dumps(_record(result), ensure_ascii=False))
    else:
        _tell(result)
    if result.count(Status.INVALID):
        raise typer.Exit(1)


def _tokenizer(model: str) -> Tokenizer:
    from kvarn.text import load_tokenizer
    from kvarn.weights import catalog, open_model

    with open_model(catalog.resolve(model)) as files:
        return load_tokenizer(files)


def _record(result: StructuredResult) -> dict[str, object]:
    from kvarn.eval.structured import Status

    return {
        "schemas": len(result.outcomes),
        "coverage": result.coverage,
        **{status.value.replace(" ", "_"): result.count(status) for status in Status},
        "compile_ms_p50": result.compile_ms(0.5),
        "compile_ms_p99": result.compile_ms(0.99),
        "reasons": dict(result.reasons()),
        "outcomes": [
            {"name": o.name, "status": o.status.value, "detail": o.detail, "compile_ms": 1000 * o.compile_seconds}
            for o in result.outcomes
        ],
    }


def _tell(result: StructuredResult) -> None:
    from kvarn.eval.structured import Status

    counts = ", ".join(f"{result.count(status)} {status.value}" for status in Status)
    print(f"{len(result.outcomes)} schemas: {result.coverage:.1%} accepted ({counts})")
    print(f"time to compile or refuse: P50 {result.compile_ms(0.5):.1f} ms, P99 {result.compile_ms(0.99):.1f} ms")
    reasons = result.reasons()
    if reasons:
        print("\nrefused, by reason:")
        for reason, count in reasons[:SHOWN]:
            print(f"{count:6}  {reason}")
        if len(reasons) > SHOWN:
            print(f"{sum(count for _, count in reasons[SHOWN:]):6}  {len(reasons) - SHOWN} more reasons")
    for status in (Status.INVALID, Status.UNCHECKED, Status.UNFINISHED):
        found = [outcome for outcome in result.outcomes if outcome.status is status]
        if found:
            print(f"\n{status.value}:")
        for outcome in found[:SHOWN]:
            print(f"  {outcome.name}: {outcome.detail or outcome.answer[:60]!r}")
