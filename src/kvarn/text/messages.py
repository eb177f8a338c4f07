"""Checks chat messages and tools as clients send them. Errors name the part that is wrong."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvarn.errors import RequestError
from kvarn.text.tokenizer import well_formed

Message = dict[str, Any]
"""`role`, `content` (text, or a list of text parts) and what else the client sent (`name`, `tool_calls`, …)."""

MAX_MESSAGES = 16_384
MAX_TOOLS = 1024
MAX_DEPTH = 32
ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


def checked_messages(messages: Any) -> list[Message]:
    """Copies of the messages, made of plain values. Raises RequestError naming, for example, `messages[3].content`."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise RequestError("messages must be a list", field="messages")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise RequestError(f"messages must be 1 to {MAX_MESSAGES}, not {len(messages)}", field="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Copies of the tools; None where there are none. Raises RequestError naming the tool."""
    if not tools:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise RequestError("tools must be a list", field="tools")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools must be at most {MAX_TOOLS}, not {len(tools)}", field="tools")
    return [_object(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def with_text(message: Message) -> Message:
    """The message with its text parts joined by line breaks."""
    content = message["content"]
    return message if isinstance(content, str) else {**message, "content": "\n".join(part["text"] for part in content)}


def with_parts(message: Message) -> Message:
    """The message with its text as a list of parts, for templates that know no other content."""
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def plain(value: Any, field: str, depth: int = 0) -> Any:
    """A copy made of JSON's kinds of values, text well-formed. Raises RequestError naming `field`."""
    if isinstance(value, str):
        return well_formed(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth >= MAX_DEPTH:
        raise RequestError(f"{field} is nested deeper than {MAX_DEPTH}", field=field)
    if isinstance(value, Mapping):
        return {_key(key, field): plain(item, f"{field}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(item, f"{field}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise RequestError(f"{field} must be made of JSON values, not {type(value).__name__}", field=field)


def _key(key: Any, field: str) -> str:
    if not isinstance(key, str):
        raise RequestError(f"{field} must have text as keys, not {key!r}", field=field)
    return well_formed(key)


def _object(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{field} must be an object", field=field)
    copied: dict[str, Any] = plain(value, field)
    return copied


def _message(message: Any, field: str) -> Message:
    checked = _object(message, field)
    role = checked.get("role")
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise RequestError(f"{field}.role must be a name such as system, user or assistant", field=f"{field}.role")
    checked["content"] = _content(checked.get("content"), role, f"{field}.content")
    if checked.get("tool_calls") is not None:
        checked["tool_calls"] = _tool_calls(checked["tool_calls"], f"{field}.tool_calls")
    return checked


def _content(content: Any, role: str, field: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":  # it may only have called tools
        return ""
    if not isinstance(content, list):
        raise RequestError(f"{field} must be text or a list of text parts", field=field)
    return [_part(part, f"{field}[{index}]") for index, part in enumerate(content)]


def _part(part: Any, field: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        what = f"not {kind!r}" if isinstance(kind, str) else "with a type"
        raise RequestError(f'{field} must be a part of type "text" (models here read text only), {what}',
                           field=f"{field}.type")  # fmt: skip
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{field}.text must be text", field=f"{field}.text")
    return {"type": "text", "text": part["text"]}


def _tool_calls(calls: Any, field: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object, which is what templates are written for."""
    if not isinstance(calls, list):
        raise RequestError(f"{field} must be a list", field=field)
    return [_tool_call(call, f"{field}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: Any, field: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{field}.function must be an object with a name", field=f"{field}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON (a model wrote it) stays as it is
            function = {**function, "arguments": plain(json.loads(arguments or "{}"), f"{field}.function.arguments")}
    return {**call, "function": function}
