"""`response_format` and `structured_outputs`: what the whole answer must be, and how it becomes a `Grammar`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from kvarn.request import Grammar, GrammarKind
from kvarn.server.errors import ApiError

Schema = dict[str, Any] | bool


class JsonSchemaFormat(BaseModel):
    """`response_format.json_schema`. The schema holds in any case: `strict: false` asks for less than is done."""

    model_config = ConfigDict(extra="forbid")
    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(BaseModel):
    """`response_format`."""

    model_config = ConfigDict(extra="forbid")
    type: StrictStr
    json_schema: JsonSchemaFormat | None = None

    def to_grammar(self) -> Grammar | None:
        """None for free text. Raises ApiError naming the part at fault."""
        name = "response_format"
        if self.json_schema is not None and self.type != "json_schema":
            raise _wrong(f"{name}.json_schema", "is for type json_schema only")
        match self.type:
            case "text":
                return None
            case "json_object":
                return Grammar.json_object()
            case "json_schema":
                if self.json_schema is None or self.json_schema.schema_ is None:
                    raise _wrong(f"{name}.json_schema.schema", "is missing")
                return Grammar.json_schema(self.json_schema.schema_)
        raise _wrong(f"{name}.type", f"must be text, json_object or json_schema, not {self.type[:40]!r}")


class StructuredOutputs(BaseModel):
    """`structured_outputs`, vLLM's field: one of its ways to say what the answer must be."""

    model_config = ConfigDict(extra="forbid")
    json_: Schema | StrictStr | None = Field(None, alias="json")
    """A schema, or its text."""
    json_object: StrictBool | None = None
    regex: StrictStr | None = None
    choice: list[StrictStr] | None = Field(None, fail_fast=True)
    grammar: StrictStr | None = None
    """In Lark's notation."""

    def to_grammar(self) -> Grammar:
        """Raises ApiError naming the part at fault."""
        ways: dict[str, tuple[Any, Callable[[Any], Grammar]]] = {
            "json": (self.json_, _schema_or_text),
            "json_object": (self.json_object or None, lambda _: Grammar.json_object()),
            "regex": (self.regex, Grammar.regex),
            "choice": (self.choice, Grammar.choice),
            "grammar": (self.grammar, Grammar.lark),
        }
        given = [(value, make) for value, make in ways.values() if value is not None]
        if len(given) != 1:
            raise _wrong("structured_outputs", f"must have exactly one of {', '.join(ways)}, not {len(given)} of them")
        value, make = given[0]
        return make(value)


def _schema_or_text(schema: Schema | str) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, schema) if isinstance(schema, str) else Grammar.json_schema(schema)


def _wrong(name: str, what: str) -> ApiError:
    return ApiError(400, f"{name} {what}", param=name, code="invalid_value")
