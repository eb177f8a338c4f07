"""Server-sent events as bytes."""

from __future__ import annotations

import json
from typing import Any

DONE = b"data: [DONE]\n\n"
"""What OpenAI's older APIs end a stream with."""


def _json(value: Any) -> bytes:
    # A lone surrogate, which UTF-8 has not, becomes the escape that JSON has for it.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def event(value: Any) -> bytes:
    """One event with a JSON value."""
    return b"data: " + _json(value) + b"\n\n"


def typed_event(value: dict[str, Any]) -> bytes:
    """One event named by the value's `type`."""
    return b"event: " + str(value["type"]).encode() + b"\ndata: " + _json(value) + b"\n\n"
