"""Anthropic's requests, and how they become chat completions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator, StrictInt, StrictStr, WithJsonSchema

from kvarn.server.protocol.blocks import kind_of, only, string, unknown, unsupported, wrong
from kvarn.server.protocol.parameters import Screening
from kvarn.server.protocol.requests import AnswerRequest, ChatCompletionRequest, ModelRequest, Number

SPELLING = (
    (re.compile(r"\.function\.parameters\b"), ".input_schema"),
    (re.compile(r"^(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"^stop(?=\[|$)"), "stop_sequences"),
    (re.compile(r"^response_format\b.*"), "output_config.format"),
)
"""What the chat completion's parameters are called here."""
TABLES = Screening(
    harmless=("metadata", "service_tier", "cache_control", "user_profile_id", "workspace_id"),
    neutral={"container": (), "mcp_servers": ([],), "context_management": (), "diagnostics": (), "inference_geo": (),
             "speed": ("standard",), "betas": ([],)},
)  # fmt: skip
THINKING = ("enabled", "adaptive", "disabled")
DISPLAYS = (None, "summarized", "omitted")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
ROLES = ("user", "assistant", "system")


def _system(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(_text(block, f"system[{place}]") for place, block in enumerate(value))
    raise ValueError("must be a string or a list of text blocks")


_TEXT_BLOCK = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
System = Annotated[
    str | None,
    PlainValidator(_system),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_BLOCK}, {"type": "null"}]}),
]


class MessagesPrompt(ModelRequest):
    """POST /v1/messages/count_tokens: what a prompt is made of."""

    screening: ClassVar[Screening] = TABLES
    messages: list[dict[str, Any]] = Field(fail_fast=True)
    system: System = None
    tools: list[dict[str, Any]] | None = Field(None, fail_fast=True)
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None

    def to_chat(self) -> ChatCompletionRequest:
        """The same as a chat completion. Raises ApiError naming the part at fault."""
        return ChatCompletionRequest.model_validate(self._chat())

    @property
    def thinks(self) -> bool | None:
        """Whether the model is asked to think; None: as it likes. Raises ApiError."""
        if self.thinking is None:
            return None
        only(self.thinking, "thinking", ("type", "budget_tokens", "display"))
        kind, budget = self.thinking.get("type"), self.thinking.get("budget_tokens")
        if kind not in THINKING:
            raise wrong("thinking.type", "must be enabled, adaptive or disabled")
        if budget is not None and (type(budget) is not int or budget < 1):
            raise wrong("thinking.budget_tokens", "must be a whole number above 0")
        if self.thinking.get("display") not in DISPLAYS:
            raise unsupported("thinking.display", "must be summarized, which here is all of it, or omitted")
        return bool(kind != "disabled")

    def _chat(self) -> dict[str, Any]:
        thinks = self.thinks
        messages = list(self._messages())
        continued = bool(self.messages) and self.messages[-1].get("role") == "assistant"
        choice = self.tool_choice or {}
        return {
            "model": self.model,
            "messages": messages,
            "tools": None if self.tools is None else [_tool(t, f"tools[{n}]") for n, t in enumerate(self.tools)],
            "tool_choice": _choice(choice),
            "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") is True else None,
            "continue_final_message": continued,
            "response_format": _format(self.output_config),
            "include_reasoning": thinks is True and (self.thinking or {}).get("display") != "omitted",
        }

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.system is not None:
            yield {"role": "system", "content": self.system}
        for place, message in enumerate(self.messages):
            where, role, content = f"messages[{place}]", message.get("role"), message.get("content")
            if role not in ROLES:
                raise wrong(f"{where}.role", f"must be {', '.join(ROLES)}")
            only(message, where, ("role", "content"))
            if isinstance(content, str):
                yield {"role": role, "content": content}
            elif isinstance(content, list):
                yield from (_called if role == "assistant" else _told)(content, role, f"{where}.content")
            else:
                raise wrong(f"{where}.content", "must be a string or a list of content blocks")


class MessagesRequest(MessagesPrompt, AnswerRequest):
    """POST /v1/messages."""

    max_tokens: StrictInt
    stop_sequences: list[StrictStr] | None = Field(None, fail_fast=True)
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    priority: StrictInt | None = None
    cache_salt: StrictStr | None = None
    """These two are the server's own, as in a chat completion."""

    def _chat(self) -> dict[str, Any]:
        names = {"max_tokens", "temperature", "top_p", "top_k", "priority", "cache_salt"}
        given = self.model_dump(include=names)
        return {**super()._chat(), **given, "stop": self.stop_sequences}


def _told(blocks: list[Any], role: str, where: str) -> Iterator[dict[str, Any]]:
    """The messages that a user's (or system's) content blocks are: results of tools come before text."""
    texts = []
    for place, block in enumerate(blocks):
        at, kind = f"{where}[{place}]", kind_of(block, f"{where}[{place}]")
        if kind == "tool_result" and role == "user":
            yield _result(block, at)
        elif kind == "text":
            texts.append({"type": "text", "text": _text(block, at)})
        else:
            raise unknown(at, kind, "text or tool_result" if role == "user" else "text")
    if texts or not blocks:
        yield {"role": role, "content": texts}


def _called(blocks: list[Any], role: str, where: str) -> Iterator[dict[str, Any]]:
    """The message that an assistant's content blocks are."""
    texts, calls, thoughts = [], [], ""
    for place, block in enumerate(blocks):
        at, kind = f"{where}[{place}]", kind_of(block, f"{where}[{place}]")
        if kind == "text":
            texts.append({"type": "text", "text": _text(block, at)})
        elif kind == "tool_use":
            calls.append(_call(block, at))
        elif kind == "thinking":
            only(block, at, ("type", "thinking", "signature"))
            thoughts += string(block, "thinking", at)
        else:
            raise unknown(at, kind, "text, thinking or tool_use")
    thought = {"reasoning_content": thoughts} if thoughts else {}
    yield {"role": role, "content": texts, **thought, **({"tool_calls": calls} if calls else {})}


def _call(block: dict[str, Any], where: str) -> dict[str, Any]:
    only(block, where, ("type", "id", "name", "input", "cache_control", "caller", "toolset_name"))
    name, given = string(block, "name", where), block.get("input")
    if not isinstance(given, dict):
        raise wrong(f"{where}.input", "must be an object")
    function = {"name": name, "arguments": json.dumps(given, ensure_ascii=False)}
    return {"id": string(block, "id", where), "type": "function", "function": function}


def _result(block: dict[str, Any], where: str) -> dict[str, Any]:
    only(block, where, ("type", "tool_use_id", "content", "is_error", "cache_control", "toolset_name"))
    content = block.get("content", "")
    if isinstance(content, list):
        content = "\n".join(_text(part, f"{where}.content[{place}]") for place, part in enumerate(content))
    if not isinstance(content, str):
        raise wrong(f"{where}.content", "must be a string or a list of text blocks")
    if block.get("is_error") is True:
        content = f"Error: {content}"
    return {"role": "tool", "tool_call_id": string(block, "tool_use_id", where), "content": content}


def _text(block: Any, where: str) -> str:
    kind = kind_of(block, where)
    if kind != "text":
        raise unknown(where, kind, "text")
    only(block, where, ("type", "text", "cache_control", "citations"))
    return string(block, "text", where)


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        what = f"must be custom, not {str(kind)[:40]!r}: Anthropic's own tools are not here"
        raise unsupported(f"{where}.type", what)
    only(tool, where, ("type", "name", "description", "input_schema", "cache_control", "strict",
                        "eager_input_streaming"))  # fmt: skip
    if not isinstance(tool.get("input_schema"), dict):
        raise wrong(f"{where}.input_schema", "must be a JSON schema")
    function = {key: tool[key] for key in ("name", "description") if key in tool}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _choice(choice: dict[str, Any]) -> str | dict[str, Any] | None:
    if not choice:
        return None
    only(choice, "tool_choice", ("type", "name", "disable_parallel_tool_use"))
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": string(choice, "name", "tool_choice")}}
    if not isinstance(kind, str) or kind not in CHOICES:
        raise wrong("tool_choice.type", f"must be {', '.join(CHOICES)} or tool")
    return CHOICES[kind]


def _format(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """`output_config` as the chat completion's `response_format`."""
    for name in config or {}:
        if name != "format" and config is not None and config[name] is not None:
            raise unsupported(f"output_config.{name[:64]}", "is not supported")
    found = (config or {}).get("format")
    if found is None:
        return None
    where = "output_config.format"
    if not isinstance(found, dict) or found.get("type") != "json_schema":
        raise wrong(where, "must be an object of type json_schema")
    only(found, where, ("type", "schema"))
    if not isinstance(found.get("schema"), dict):
        raise wrong(f"{where}.schema", "must be a JSON schema")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": found["schema"]}}
