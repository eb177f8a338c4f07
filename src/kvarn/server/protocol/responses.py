"""OpenAI's stateless responses, and how they become chat completions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator, StrictBool, StrictInt, StrictStr, WithJsonSchema

from kvarn.server.protocol.blocks import kind_of, only, string, unknown, unsupported, wrong
from kvarn.server.protocol.parameters import Screening
from kvarn.server.protocol.requests import AnswerRequest, ChatCompletionRequest, Number

SPELLING = (
    (re.compile(r"^(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"^max_(completion_)?tokens$"), "max_output_tokens"),
    (re.compile(r"^response_format\b.*"), "text.format"),
    (re.compile(r"^messages$"), "input"),
    (re.compile(r"^reasoning_effort$"), "reasoning.effort"),
)
"""What the chat completion's parameters are called here."""
TABLES = Screening(
    harmless=("user", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
              "prompt_cache_options"),
    neutral={"store": (False,), "background": (False,), "previous_response_id": (), "conversation": (), "prompt": (),
             "truncation": ("disabled",), "max_tool_calls": (),
             "context_management": ([],), "moderation": (), "stream_options": ({}, {"include_obfuscation": False})},
)  # fmt: skip
ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
TEXTS = ("input_text", "output_text")
LOGPROBS = "message.output_text.logprobs"
"""What `include` may ask for."""


def _input(value: Any) -> Any:
    items = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    if value and (items or isinstance(value, str)):
        return value
    raise ValueError("must be a string or a list of items, not empty")


Input = Annotated[
    str | list[dict[str, Any]],
    PlainValidator(_input),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]


class ResponsesRequest(AnswerRequest):
    """POST /v1/responses."""

    screening: ClassVar[Screening] = TABLES
    input: Input
    instructions: StrictStr | None = None
    tools: list[dict[str, Any]] | None = Field(None, fail_fast=True)
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    text: dict[str, Any] | None = None
    max_output_tokens: StrictInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    reasoning: dict[str, Any] | None = None
    include: list[StrictStr] | None = Field(None, fail_fast=True)
    top_logprobs: StrictInt | None = None
    metadata: dict[str, StrictStr] | None = None
    """Comes back with the answer."""
    priority: StrictInt | None = None
    cache_salt: StrictStr | None = None
    """These two are the server's own, as in a chat completion."""

    def to_chat(self) -> ChatCompletionRequest:
        """The same as a chat completion. Raises ApiError naming the part at fault."""
        names = {"model", "parallel_tool_calls", "temperature", "top_p", "priority", "cache_salt"}
        tools = None if self.tools is None else [_tool(tool, f"tools[{n}]") for n, tool in enumerate(self.tools)]
        asked = {
            "messages": list(self._messages()),
            "tools": tools,
            "tool_choice": _choice(self.tool_choice),
            "max_completion_tokens": self.max_output_tokens,
            "response_format": _format(self.text),
            "reasoning_effort": self._effort(),
            "logprobs": self.with_logprobs or None,
            "top_logprobs": self.top_logprobs if self.with_logprobs else None,
        }
        return ChatCompletionRequest.model_validate({**self.model_dump(include=names), **asked})

    @property
    def with_logprobs(self) -> bool:
        """Whether those of the answer's text are told. Raises ApiError."""
        other = next((name for name in self.include or () if name != LOGPROBS), None)
        if other is not None:
            raise unsupported("include", f"must be [] or [{LOGPROBS!r}], not {other[:60]!r}")
        return bool(self.include) or bool(self.top_logprobs)

    def _effort(self) -> Any:
        """How much the model is to think. Raises ApiError, also where a summary of that is wanted."""
        if self.reasoning is None:
            return None
        only(self.reasoning, "reasoning", ("effort", "summary", "generate_summary"))
        for name in ("summary", "generate_summary"):
            if self.reasoning.get(name) is not None:
                raise unsupported(f"reasoning.{name}", "must be null: thoughts are told as they are")
        effort = self.reasoning.get("effort")
        if effort is not None and not isinstance(effort, str):
            raise wrong("reasoning.effort", "must be a string")
        return effort

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.instructions is not None:
            yield {"role": "system", "content": self.instructions}
        if isinstance(self.input, str):
            yield {"role": "user", "content": self.input}
            return
        calls: list[dict[str, Any]] = []
        thought: dict[str, str] = {}
        for place, item in enumerate(self.input):
            where, kind = f"input[{place}]", item.get("type", "message")
            if kind == "function_call":
                calls.append(_call(item, where))
                continue
            if calls:
                yield {"role": "assistant", "content": "", **thought, "tool_calls": calls}
                calls, thought = [], {}
            if kind == "message":
                message = _message(item, where)
                yield {**message, **thought} if message["role"] == "assistant" else message
                thought = {}
            elif kind == "function_call_output":
                yield _result(item, where)
            elif kind == "reasoning":
                thought = _thought(item, where)
            else:
                raise unknown(where, str(kind), "message, reasoning, function_call or function_call_output")
        if calls:
            yield {"role": "assistant", "content": "", **thought, "tool_calls": calls}


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    only(item, where, ("type", "id", "role", "content", "status", "phase"))
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{where}.role", f"must be {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": _text(item.get("content"), f"{where}.content")}


def _thought(item: dict[str, Any], where: str) -> dict[str, str]:
    """Of the message or the calls that follow, for templates that show a model what it has thought."""
    only(item, where, ("type", "id", "summary", "content", "encrypted_content", "status"))
    content = item.get("content") or []
    if not isinstance(content, list):
        raise wrong(f"{where}.content", "must be a list of parts")
    text = ""
    for place, part in enumerate(content):
        at, kind = f"{where}.content[{place}]", kind_of(part, f"{where}.content[{place}]")
        if kind != "reasoning_text":
            raise unknown(at, kind, "reasoning_text")
        text += string(part, "text", at)
    return {"reasoning_content": text} if text else {}


def _text(content: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(where, "must be a string or a list of text parts")
    parts = []
    for place, part in enumerate(content):
        at, kind = f"{where}[{place}]", kind_of(part, f"{where}[{place}]")
        if kind not in TEXTS:
            raise unknown(at, kind, " or ".join(TEXTS))
        only(part, at, ("type", "text", "annotations", "logprobs"))
        parts.append({"type": "text", "text": string(part, "text", at)})
    return parts


def _call(item: dict[str, Any], where: str) -> dict[str, Any]:
    only(item, where, ("type", "id", "call_id", "name", "arguments", "status", "caller", "namespace"))
    function = {"name": string(item, "name", where), "arguments": string(item, "arguments", where)}
    return {"id": string(item, "call_id", where), "type": "function", "function": function}


def _result(item: dict[str, Any], where: str) -> dict[str, Any]:
    only(item, where, ("type", "id", "call_id", "output", "status"))
    content = _text(item.get("output"), f"{where}.output")
    return {"role": "tool", "tool_call_id": string(item, "call_id", where), "content": content}


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise unsupported(f"{where}.type", f"must be function, not {str(tool.get('type'))[:40]!r}: OpenAI's own tools "
                          "are not here")  # fmt: skip
    only(tool, where, ("type", "name", "description", "parameters", "strict"))
    function = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    only(choice, "tool_choice", ("type", "name"))
    if choice.get("type") != "function":
        raise unsupported("tool_choice.type", "must be function")
    return {"type": "function", "function": {"name": string(choice, "name", "tool_choice")}}


def _format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    """`text` as the chat completion's `response_format`."""
    if text is None:
        return None
    only(text, "text", ("format", "verbosity"))
    if text.get("verbosity") not in (None, "medium"):
        raise unsupported("text.verbosity", "must be medium")
    found, where = text.get("format"), "text.format"
    if found is None:
        return None
    kind = kind_of(found, where)
    if kind in ("text", "json_object"):
        only(found, where, ("type",))
        return {"type": kind}
    if kind != "json_schema":
        raise wrong(f"{where}.type", "must be text, json_object or json_schema")
    only(found, where, ("type", "name", "schema", "strict", "description"))
    if not isinstance(found.get("schema"), dict):
        raise wrong(f"{where}.schema", "must be a JSON schema")
    return {"type": kind, "json_schema": {"name": "output", "schema": found["schema"]}}
