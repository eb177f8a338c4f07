"""What becomes of a parameter: a field of a request model is honoured; these tables have the rest.

A parameter that is in neither is refused as unknown, so that a misspelt one is not lost without a word.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from kvarn.request import MAX_LOGIT_BIAS, MAX_STOP_STRINGS
from kvarn.server.errors import ApiError
from kvarn.text.messages import MAX_MESSAGES, MAX_TOOLS

HARMLESS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options",
})  # fmt: skip
"""Accepted and ignored: they name, file or bill a request and cannot change its answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "reasoning_effort": (),
    "web_search_options": (),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
    "add_special_tokens": (False,),
    "logits_processors": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "chat_template": (),
    "documents": ([],),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "mm_processor_kwargs": (),
    "request_id": (),
}
"""Not honoured by an endpoint whose request model lacks it: refused by name there, unless null or one of these values,
which ask for nothing."""

RENAMED = {
    "guided_json": "structured_outputs.json", "guided_regex": "structured_outputs.regex",
    "guided_choice": "structured_outputs.choice", "guided_grammar": "structured_outputs.grammar",
    "guided_json_object": "structured_outputs.json_object",
    "guided_whitespace_pattern": "structured_outputs, whose JSON has white space of its own",
    "guided_decoding_backend": "structured_outputs, of which there is one implementation",
}  # fmt: skip
"""What vLLM has given up for other parameters: refused with the name of what to use."""

MOST_ENTRIES = {
    "messages": MAX_MESSAGES, "tools": MAX_TOOLS, "stop": MAX_STOP_STRINGS, "logit_bias": MAX_LOGIT_BIAS,
    "stop_token_ids": 1024,
}  # fmt: skip
"""Entries of a list or an object at most, looked at before any entry is."""


def screen(values: dict[str, Any], honoured: Collection[str]) -> dict[str, Any]:
    """The values that a request model with the fields `honoured` is made of.

    Raises ApiError 400 naming the first parameter that is not honoured yet, unknown, or has too many entries.
    """
    kept = {}
    for name, value in values.items():
        if name in honoured:
            _check_entries(name, value)
            kept[name] = value
        elif name in RENAMED:
            if value is not None:
                message = f"{name} is not supported: use {RENAMED[name]}"
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        elif name in NEUTRAL:
            if value is not None and value not in NEUTRAL[name]:
                raise ApiError(400, f"{name} is not supported here yet", param=name, code="unsupported_parameter")
        elif name not in HARMLESS:
            shown = name[:64]
            raise ApiError(400, f"unknown parameter {shown}", param=shown, code="unknown_parameter")
    return kept


def _check_entries(name: str, value: Any) -> None:
    most = MOST_ENTRIES.get(name)
    if most is not None and isinstance(value, list | dict) and len(value) > most:
        limit = "stop_strings" if name == "stop" else name
        message = f"{name} must have at most {most} entries, not {len(value)} (max_{limit})"
        raise ApiError(400, message, param=name, code="invalid_value")
