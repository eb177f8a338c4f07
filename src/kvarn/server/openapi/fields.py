"""What JSON schemas of request models lack: bounds that are checked later, and parameters that are not fields."""

from __future__ import annotations

from typing import Any

from kvarn.request import (
    MAX_CACHE_SALT_CHARS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    SEED_LIMIT,
)
from kvarn.server.protocol import ModelRequest
from kvarn.server.protocol.embeddings import FORMATS
from kvarn.text.messages import MAX_MESSAGES, MAX_TOOLS

Schema = dict[str, Any]



def closed(properties: dict[str, Schema], *required: str) -> Schema:
    """An object that has nothing else."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


TEXT: Schema = {"type": "string"}
TEXT_PART: Schema = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": TEXT},
    "required": ["type", "text"],
}
MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9_-]{0,63}$", "examples": ["user"]},
        "content": {"anyOf": [TEXT, {"type": "array", "items": TEXT_PART}, {"type": "null"}]},
    },
    "required": ["role", "content"],
}
TOOL: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
                "description": TEXT,
                "parameters": {"type": "object"},
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
_PENALTY: Schema = {"minimum": -2, "maximum": 2}
BOUNDS: dict[str, Schema] = {
    "messages": {"minItems": 1, "maxItems": MAX_MESSAGES, "items": MESSAGE},
    "tools": {"maxItems": MAX_TOOLS, "items": TOOL},
    "n": {"minimum": 1, "maximum": MAX_N},
    "seed": {"minimum": -SEED_LIMIT, "maximum": SEED_LIMIT - 1},
    "temperature": {"minimum": 0, "maximum": 100},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1},
    "min_p": {"minimum": 0, "maximum": 1},
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 100},
    "logit_bias": {
        "maxProperties": MAX_LOGIT_BIAS,
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "stop": {"maxItems": MAX_STOP_STRINGS, "minLength": 1, "maxLength": MAX_STOP_STRING_CHARS},
    "stop_sequences": {"maxItems": MAX_STOP_STRINGS},
    "max_tokens": {"minimum": 1},
    "max_completion_tokens": {"minimum": 1},
    "max_output_tokens": {"minimum": 1},
    "min_tokens": {"minimum": 0},
    "num_speculative_tokens": {"minimum": 0},
    "priority": {"minimum": -(2**31), "maximum": 2**31 - 1},
    "cache_salt": {"minLength": 1, "maxLength": MAX_CACHE_SALT_CHARS},
    "logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "dimensions": {"minimum": 1},
    "input": {"minLength": 1, "minItems": 1},
    "encoding_format": {"enum": list(FORMATS)},
    "pooling": {"enum": ["mean", "last"]},
}
"""By name: keywords that go to those alternatives of a property that they have a meaning for."""
_MEANT_FOR = {
    "minimum": ("integer", "number"), "maximum": ("integer", "number"), "exclusiveMinimum": ("integer", "number"),
    "minItems": ("array",), "maxItems": ("array",), "items": ("array",),
    "minLength": ("string",), "maxLength": ("string",), "pattern": ("string",), "enum": ("string",),
    "maxProperties": ("object",), "propertyNames": ("object",), "additionalProperties": ("object",),
}  # fmt: skip


def refined(schema: Schema, model: type[ModelRequest], own: dict[str, Schema]) -> Schema:
    """A request model's schema with bounds, and with the parameters that are ignored or may only ask for nothing.

    own: bounds of this model, before the common ones.
    """
    properties = {name: _bounded(value, own.get(name) or BOUNDS.get(name, {})) for name, value in
                  schema["properties"].items()}  # fmt: skip
    for name in model.screening.harmless:
        properties.setdefault(name, {"description": "Ignored: it cannot change an answer."})
    for name, values in model.screening.neutral.items():
        properties.setdefault(name, {"description": "Not honoured here.", "enum": [*values, None]})
    return {**schema, "properties": dict(sorted(properties.items()))}


def _bounded(schema: Schema, bounds: Schema) -> Schema:
    if "anyOf" in schema:
        return {**schema, "anyOf": [_bounded(branch, bounds) for branch in schema["anyOf"]]}
    fitting = {key: value for key, value in bounds.items() if schema.get("type") in _MEANT_FOR[key]}
    return {**schema, **fitting}
