"""What each route takes and answers: the table that /openapi.json is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvarn.server.openapi import replies
from kvarn.server.openapi.fields import TEXT, Schema, closed
from kvarn.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ModelRequest,
    TokenizeRequest,
)
from kvarn.server.protocol.messages import MessagesPrompt, MessagesRequest
from kvarn.server.protocol.responses import ResponsesRequest


@dataclass(frozen=True, slots=True)
class Operation:
    """One route. reply: of 200. body: None where it takes none. bounds: of the body's properties, before `BOUNDS`."""

    reply: Schema
    body: type[ModelRequest] | None = None
    streams: bool = False
    error: Schema = field(default_factory=lambda: replies.ERROR)
    bounds: dict[str, Schema] = field(default_factory=dict)
    also: Schema = field(default_factory=dict)
    """Keywords of the body as a whole."""
    media_type: str = "application/json"


_TEXT_BLOCK = closed({"type": {"const": "text"}, "text": TEXT}, "type", "text")
_BLOCK: Schema = {"anyOf": [
    _TEXT_BLOCK,
    closed({"type": {"const": "tool_use"}, "id": TEXT, "name": TEXT, "input": {"type": "object"}},
           "type", "id", "name", "input"),
    closed({"type": {"const": "tool_result"}, "tool_use_id": TEXT, "is_error": {"type": "boolean"},
            "content": {"anyOf": [TEXT, {"type": "array", "items": _TEXT_BLOCK}]}}, "type", "tool_use_id"),
]}  # fmt: skip
_ANTHROPIC: dict[str, Schema] = {
    "messages": {
        "minItems": 1,
        "items": {
            "type": "object",
            "properties": {
                "role": replies.one_of("user", "assistant", "system"),
                "content": {"anyOf": [TEXT, {"type": "array", "items": _BLOCK}]},
            },
            "required": ["role", "content"],
            "additionalProperties": False,
        },
    },
    "tools": {
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
                "description": TEXT,
                "input_schema": {"type": "object"},
            },
            "required": ["name", "input_schema"],
        }
    },
}
_TOOL_NAME: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}
_RESPONSES: dict[str, Schema] = {
    "input": {
        "minItems": 1,
        "items": {"anyOf": [
            closed({"type": {"const": "message"}, "role": replies.one_of("user", "assistant", "system", "developer"),
                    "content": TEXT}, "role", "content"),
            closed({"type": {"const": "function_call"}, "call_id": TEXT, "name": TEXT, "arguments": TEXT},
                   "type", "call_id", "name", "arguments"),
            closed({"type": {"const": "function_call_output"}, "call_id": TEXT, "output": TEXT},
                   "type", "call_id", "output"),
        ]},
    },
    "tools": {
        "items": closed({"type": {"const": "function"}, "name": _TOOL_NAME, "description": TEXT,
                         "parameters": {"type": "object"}, "strict": {"type": "boolean"}}, "type", "name"),
    },
}  # fmt: skip

OPERATIONS: dict[str, Operation] = {
    "/health": Operation(replies.STATUS),
    "/health/live": Operation(replies.STATUS),
    "/health/ready": Operation(replies.STATUS),
    "/version": Operation(replies.VERSION),
    "/metrics": Operation(TEXT, media_type="text/plain"),
    "/dashboard/state": Operation({"type": "object"}),
    "/v1/models": Operation(replies.MODELS),
    "/v1/models/{name}": Operation(replies.MODEL),
    "/v1/chat/completions": Operation(replies.CHAT, ChatCompletionRequest, streams=True),
    "/v1/chat/completions/input_tokens": Operation(replies.INPUT_TOKENS, ChatCompletionRequest),
    "/v1/completions": Operation(replies.COMPLETION, CompletionRequest, streams=True),
    "/v1/responses": Operation(replies.RESPONSE, ResponsesRequest, streams=True, bounds=_RESPONSES),
    "/v1/embeddings": Operation(replies.EMBEDDINGS, EmbeddingRequest),
    "/tokenize": Operation(
        replies.TOKENS, TokenizeRequest, also={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    ),
    "/detokenize": Operation(replies.PROMPT, DetokenizeRequest),
    "/v1/messages": Operation(
        replies.ANTHROPIC_MESSAGE, MessagesRequest, streams=True, error=replies.ANTHROPIC_ERROR, bounds=_ANTHROPIC
    ),
    "/v1/messages/count_tokens": Operation(
        replies.ANTHROPIC_COUNT, MessagesPrompt, error=replies.ANTHROPIC_ERROR, bounds=_ANTHROPIC
    ),
}  # fmt: skip
"""By path, each of one method."""
