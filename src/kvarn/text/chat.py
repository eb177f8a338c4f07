"""Chat messages before and after the template: validation, and keeping special-token look-alikes in them plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvarn.errors import RequestError

OPEN, CLOSE = "\ue000", "\ue001"
"""Private-use characters around the number that stands for a protected text while the template runs."""
MAX_MESSAGES = 4096


def validate_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages with text content joined. Raises RequestError naming what is wrong."""
    if not messages:
        raise RequestError("messages must not be empty", field="messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"messages may be at most {MAX_MESSAGES}, not {len(messages)}", field="messages")
    return [_validate(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _validate(message: Any, field: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{field} must be an object", field=field)
    role = message.get("role")
    if not isinstance(role, str) or not re.fullmatch(r"[a-z_]{1,32}", role):
        raise RequestError(f"{field}.role must be a name such as system, user or assistant", field=f"{field}.role")
    content = message.get("content")
    if content is None and (role == "assistant" or message.get("tool_calls")):
        content = ""
    if isinstance(content, list):
        content = "".join(_text_of(part, f"{field}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise RequestError(f"{field}.content must be a string or a list of text parts", field=f"{field}.content")
    return {**message, "content": content}


def _text_of(part: Any, field: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise RequestError(f'{field} must be {{"type": "text", "text": …}}: the model reads text only', field=field)
    text: str = part["text"]
    return text


def protect(values: Any, special_texts: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """Replaces every special token's text inside the strings of `values` (nested lists and objects) by a placeholder.

    Roles stay. Returns the copy and the table from placeholder to text, for `split_protected`. Strings without such a
    text come back unchanged, so that ordinary messages tokenize as they always would.
    """
    if not special_texts:
        return values, {}
    pattern = re.compile("|".join(re.escape(text) for text in special_texts))
    nonce = 0
    whole = repr(values)
    while f"{OPEN}{nonce}:" in whole:
        nonce += 1
    table: dict[str, str] = {}

    def shield(match: re.Match[str]) -> str:
        key = f"{OPEN}{nonce}:{len(table)}{CLOSE}"
        table[key] = match.group()
        return key

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(shield, value)
        if isinstance(value, Mapping):
            return {k: v if k == "role" else walk(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [walk(item) for item in value]
        return value

    return walk(values), table


def split_protected(rendered: str, table: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """Pieces of the rendered text in order as (text, literal); literal ones were protected."""
    if not table:
        yield rendered, False
        return
    pattern = re.compile("(" + "|".join(re.escape(key) for key in table) + ")")
    for piece in pattern.split(rendered):
        if piece in table:
            yield table[piece], True
        elif piece:
            yield piece, False
