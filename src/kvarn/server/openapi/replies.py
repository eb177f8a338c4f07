"""JSON schemas of what the server answers."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}


def nullable(schema: Schema) -> Schema:
    """That, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def listed(items: Schema) -> Schema:
    """A list of those."""
    return {"type": "array", "items": items}


def one_of(*values: str) -> Schema:
    """One of these texts."""
    return {"type": "string", "enum": list(values)}


def record(optional: Schema | None = None, **required: Schema) -> Schema:
    """An object. More may be in it: what is asked for by name, and what later versions add."""
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


ERROR = record(error=record(message=TEXT, type=TEXT, param=nullable(TEXT), code=nullable(TEXT)))
ANTHROPIC_ERROR = record(type=one_of("error"), error=record(type=TEXT, message=TEXT))

_USAGE = record(
    {"prompt_tokens_details": record(cached_tokens=COUNT), "completion_tokens_details": record()},
    prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT,
)  # fmt: skip
_TOKEN = {"token": TEXT, "logprob": NUMBER, "bytes": nullable(listed(COUNT))}
_TOKENS = listed(record(**_TOKEN, top_logprobs=listed(record(**_TOKEN))))
_CHAT_LOGPROBS = record(content=_TOKENS, refusal={"type": "null"})
_CALL = record(id=TEXT, type=one_of("function"), function=record(name=TEXT, arguments=TEXT))
_MESSAGE = record(
    {"tool_calls": listed(_CALL)}, role=one_of("assistant"), content=nullable(TEXT), refusal={"type": "null"}
)
_HEAD = {"id": TEXT, "created": COUNT, "model": TEXT}
_CHAT_ENDS = one_of("stop", "length", "tool_calls", "abort", "error")
CHAT = record(
    object=one_of("chat.completion"), **_HEAD, usage=_USAGE,
    choices=listed(record(index=COUNT, message=_MESSAGE, logprobs=nullable(_CHAT_LOGPROBS), finish_reason=_CHAT_ENDS)),
)  # fmt: skip
_LOGPROBS = record(
    tokens=listed(TEXT), token_logprobs=listed(nullable(NUMBER)), text_offset=listed(COUNT),
    top_logprobs=nullable(listed(nullable({"type": "object", "additionalProperties": NUMBER}))),
)  # fmt: skip
COMPLETION = record(
    object=one_of("text_completion"), **_HEAD, usage=_USAGE,
    choices=listed(record(index=COUNT, text=TEXT, logprobs=nullable(_LOGPROBS),
                          finish_reason=one_of("stop", "length", "abort", "error"))),
)  # fmt: skip
MODEL = record(
    {"max_model_len": nullable(COUNT), "state": one_of("unloaded", "loading", "loaded", "unloading", "failed")},
    id=TEXT, object=one_of("model"), created=COUNT, owned_by=TEXT,
)  # fmt: skip
MODELS = record(object=one_of("list"), data=listed(MODEL))
EMBEDDINGS = record(
    object=one_of("list"), model=TEXT, usage=record(prompt_tokens=COUNT, total_tokens=COUNT),
    data=listed(record(object=one_of("embedding"), index=COUNT, embedding={"anyOf": [listed(NUMBER), TEXT]})),
)  # fmt: skip
TOKENS = record(count=COUNT, max_model_len=COUNT, tokens=listed(COUNT), token_strs=nullable(listed(TEXT)))
PROMPT = record(prompt=TEXT)
INPUT_TOKENS = record(object=one_of("response.input_tokens"), input_tokens=COUNT)
ANTHROPIC_COUNT = record(input_tokens=COUNT)
_BLOCK = {"anyOf": [
    record(type=one_of("text"), text=TEXT),
    record(type=one_of("tool_use"), id=TEXT, name=TEXT, input=record()),
]}  # fmt: skip
ANTHROPIC_MESSAGE = record(
    id=TEXT, type=one_of("message"), role=one_of("assistant"), model=TEXT, content=listed(_BLOCK),
    stop_reason=one_of("end_turn", "max_tokens", "stop_sequence", "tool_use"), stop_sequence=nullable(TEXT),
    usage=record({"cache_read_input_tokens": COUNT}, input_tokens=COUNT, output_tokens=COUNT),
)  # fmt: skip
_ITEM = {"anyOf": [
    record(type=one_of("message"), id=TEXT, role=one_of("assistant"), status=TEXT,
           content=listed(record(type=one_of("output_text"), text=TEXT, annotations=listed({})))),
    record(type=one_of("function_call"), id=TEXT, call_id=TEXT, name=TEXT, arguments=TEXT, status=TEXT),
]}  # fmt: skip
RESPONSE = record(
    id=TEXT, object=one_of("response"), created_at=COUNT, model=TEXT, status=one_of("completed", "incomplete"),
    output=listed(_ITEM), error={"type": "null"}, incomplete_details=nullable(record(reason=TEXT)),
    usage=record(input_tokens=COUNT, output_tokens=COUNT, total_tokens=COUNT),
)  # fmt: skip
STATUS = record(status=TEXT)
VERSION = record(version=TEXT)
