"""What becomes of a parameter: a field of a request model is honoured; these tables have the rest.

A parameter that is in neither is refused as unknown, so that a misspelt one is not lost without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvarn.request import MAX_ALLOWED_TOKEN_IDS, MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_STRINGS
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
    "add_special_tokens": (False,),
    "logits_processors": ([],),
    "chat_template": (),
    "documents": ([],),
    "spaces_between_special_tokens": (True, False),
    "mm_processor_kwargs": (),
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

MAX_DOCUMENTS = 256
MOST_ENTRIES = {
    "messages": MAX_MESSAGES, "tools": MAX_TOOLS, "stop": MAX_STOP_STRINGS, "logit_bias": MAX_LOGIT_BIAS,
    "stop_token_ids": 1024, "allowed_token_ids": MAX_ALLOWED_TOKEN_IDS, "bad_words": MAX_BAD_WORDS,
    "documents": MAX_DOCUMENTS, "stop_sequences": MAX_STOP_STRINGS,
}  # fmt: skip
"""Entries of a list or an object at most, looked at before any entry is."""

LIMIT_NAMES = {
    "messages": "max_messages", "tools": "max_tools", "stop": "max_stop_strings", "stop_sequences": "max_stop_strings",
    "logit_bias": "max_logit_bias", "prompt": "max_prompts", "input": "max_inputs",
}  # fmt: skip
"""The server's limits (`ServerLimits`) on the entries of parameters; the above are the most that these can be."""


@dataclass(frozen=True, slots=True)
class Screening:
    """The tables of one API. See `HARMLESS`, `NEUTRAL` and `RENAMED`."""

    harmless: Collection[str] = ()
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


COMPLETIONS = Screening(HARMLESS, NEUTRAL, RENAMED)
"""Of completions and chat completions."""


def screen(values: dict[str, Any], honoured: Collection[str], tables: Screening = COMPLETIONS) -> dict[str, Any]:
    """The values that a request model with the fields `honoured` is made of.

    Raises ApiError 400 naming the first parameter that is not honoured yet, unknown, or has too many entries.
    """
    kept = {}
    for name, value in values.items():
        if name in honoured:
            _check_entries(name, value)
            kept[name] = value
        elif name in tables.renamed:
            if value is not None:
                message = f"{name} is not supported: use {tables.renamed[name]}"
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        elif name in tables.neutral:
            if value is not None and not any(_same(value, known) for known in tables.neutral[name]):
                raise ApiError(400, f"{name} is not supported here yet", param=name, code="unsupported_parameter")
        elif name not in tables.harmless:
            shown = name[:64]
            raise ApiError(400, f"unknown parameter {shown}", param=shown, code="unknown_parameter")
    return kept


def _same(value: Any, known: Any) -> bool:
    """Equal, but 0 is not false."""
    return bool(value == known) and isinstance(value, bool) == isinstance(known, bool)


def _check_entries(name: str, value: Any) -> None:
    most = MOST_ENTRIES.get(name)
    if most is not None and isinstance(value, list | dict) and len(value) > most:
        limit = f" ({LIMIT_NAMES[name]})" if name in LIMIT_NAMES else ""
        message = f"{name} must have at most {most} entries, not {len(value)}{limit}"
        raise ApiError(400, message, param=name, code="invalid_value")
