"""`--json-schema` and `--regex`: what an answer in the terminal must be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from kvarn.cli.options import read_text
from kvarn.errors import ConfigError
from kvarn.request import Grammar, GrammarKind, SamplingParams

JsonSchema = Annotated[
    str | None, typer.Option("--json-schema", help="File with a JSON schema that the answer must satisfy.")
]
Regex = Annotated[str | None, typer.Option("--regex", help="Regular expression that the whole answer must match.")]


def structured(sampling: SamplingParams, json_schema: str | None, regex: str | None) -> SamplingParams:
    """The same, with the grammar that the options ask for. Raises ConfigError."""
    if json_schema is not None and regex is not None:
        raise ConfigError("--json-schema and --regex exclude one another")
    if json_schema is not None:
        grammar = Grammar(GrammarKind.JSON_SCHEMA, read_text(Path(json_schema), "--json-schema"))
    elif regex is not None:
        grammar = Grammar.regex(regex)
    else:
        return sampling
    return dataclasses.replace(sampling, grammar=grammar)
