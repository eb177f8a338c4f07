"""`ToolUse`: the tools of one chat request, checked, and what the answer may be."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from kvarn.grammar.source import check_meaning
from kvarn.request import Grammar, SamplingParams
from kvarn.server.errors import ApiError
from kvarn.server.tools.calls import CallReader
from kvarn.server.tools.formats import ToolFormat, tool_format
from kvarn.text import Tokenizer

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """tools: as they were sent, for the chat template. schemas: of the arguments, by name, of those that may be called.
    must: the answer is calls and nothing else. several: as many as the model likes."""

    form: ToolFormat
    tools: Sequence[dict[str, Any]]
    schemas: Mapping[str, dict[str, Any]]
    must: bool
    several: bool

    @classmethod
    def of(
        cls, tools: Sequence[dict[str, Any]] | None, choice: Any, parallel: bool | None, tokenizer: Tokenizer
    ) -> Self | None:
        """None where no tool may be called. Raises ApiError naming the part at fault.

        tools, choice, parallel: the fields `tools`, `tool_choice` and `parallel_tool_calls` of a request.
        """
        schemas = _schemas(tools or [])
        named = _named(choice)
        if named is None and choice not in (None, *CHOICES):
            raise _wrong("tool_choice", f"must be {', '.join(CHOICES)}, or name a function")
        if not schemas and (named is not None or choice == "required"):
            raise _wrong("tool_choice", "needs tools")
        if not schemas or choice == "none":
            return None
        if named is not None:
            if named not in schemas:
                raise _wrong("tool_choice", f"names {named!r}, which is none of the tools")
            schemas = {named: schemas[named]}
        form = tool_format(tokenizer)
        if form is None:
            message = "the model's chat template has no way of calling tools that is known here"
            raise ApiError(400, message, param="tools", code="unsupported_parameter")
        return cls(form, tools or [], schemas, named is not None or choice == "required",
                   parallel is not False and named is None)  # fmt: skip

    def bind(self, sampling: SamplingParams) -> SamplingParams:
        """The same, for an answer that calls tools. Raises ApiError where another form is asked for already, and
        RequestError with field "grammar" for schemas that cannot be held to."""
        if sampling.grammar is not None:
            raise _wrong("tools", "cannot be called in an answer of another form (response_format, structured_outputs)")
        for schema in self.schemas.values():
            check_meaning(schema)
        grammar = Grammar.lark(self.form.grammar(self.schemas, must=self.must, several=self.several))
        return dataclasses.replace(sampling, grammar=grammar)

    @property
    def text_first(self) -> bool:
        """Whether any text may come before calls."""
        return self.form.marked and not self.must

    def reader(self) -> CallReader:
        """For one answer."""
        return CallReader(self.form, must=self.must)


def _schemas(tools: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    schemas: dict[str, dict[str, Any]] = {}
    for place, tool in enumerate(tools):
        where = f"tools[{place}]"
        if tool.get("type") != "function":
            raise _wrong(f"{where}.type", "must be function")
        function = tool.get("function")
        if not isinstance(function, dict):
            raise _wrong(f"{where}.function", "must be an object")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise _wrong(f"{where}.function.name", "must be 1 to 64 letters, digits and _ . -")
        if name in schemas:
            raise _wrong(f"{where}.function.name", f"{name!r} is there twice")
        if parameters is not None and not isinstance(parameters, dict):
            raise _wrong(f"{where}.function.parameters", "must be a JSON schema")
        schemas[name] = parameters or {"type": "object", "properties": {}, "additionalProperties": False}
        if "type" not in schemas[name] and "properties" in schemas[name]:
            schemas[name] = {"type": "object", **schemas[name]}
    return schemas


def _named(choice: Any) -> str | None:
    """The function that `tool_choice` names."""
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict):
        name = choice["function"].get("name")
        return name if isinstance(name, str) else None
    return None


def _wrong(name: str, what: str) -> ApiError:
    return ApiError(400, f"{name} {what}", param=name, code="invalid_value")
