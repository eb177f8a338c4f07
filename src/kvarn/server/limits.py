"""`ServerLimits`: what a client may send, and how long anything may take; built from flags."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from kvarn.errors import ConfigError
from kvarn.request import MAX_LOGIT_BIAS, MAX_N, MAX_STOP_STRINGS

MAX_MESSAGES, MAX_TOOLS, MAX_PROMPTS, MAX_INPUTS = 16_384, 1024, 64, 2048
"""What the parts that read requests take at most; tests hold that they agree."""


def _limit(default: Any, says: str, *, most: int | None = None) -> Any:
    """A field. says: what `--help` says of it. most: what an engine takes, beyond which nobody can go."""
    return field(default=default, metadata={"help": says, "most": most})


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Each field is a limit with its default, the flag of the same name, and the name in errors and in the metric
    `kvarn:limit_refusals`. Times are in seconds. Limits of the queue, of lengths and of grammars are the engine's:
    `EngineConfig`.

    Raises ConfigError naming the field on construction.
    """

    max_connections: int = _limit(2048, "Connections at the same time; one more gets 503.")
    max_header_bytes: int = _limit(32 << 10, "Headers of a request, its URL included; beyond: 431.")
    max_url_bytes: int = _limit(8 << 10, "URL of a request; beyond: 414.")
    max_body_bytes: int = _limit(8 << 20, "Largest request body; beyond: 413.")
    max_unparsed_bytes: int = _limit(256 << 20, "Bodies of all requests that are being read; beyond: 429.")
    max_messages: int = _limit(MAX_MESSAGES, "Messages of a conversation.", most=MAX_MESSAGES)
    max_tools: int = _limit(MAX_TOOLS, "Tools of a request.", most=MAX_TOOLS)
    max_prompts: int = _limit(MAX_PROMPTS, "Prompts of a request.", most=MAX_PROMPTS)
    max_inputs: int = _limit(MAX_INPUTS, "Texts to embed in a request.", most=MAX_INPUTS)
    max_prompt_tokens: int | None = _limit(None, "Tokens of a prompt; unset: what --max-model-len leaves.")
    max_output_tokens: int | None = _limit(
        None, "Largest max_tokens, and the one of requests without it; unset: what --max-model-len leaves."
    )
    max_n: int = _limit(MAX_N, "Answers to a prompt (n).", most=MAX_N)
    max_stop_strings: int = _limit(MAX_STOP_STRINGS, "Stop strings of a request.", most=MAX_STOP_STRINGS)
    max_logit_bias: int = _limit(MAX_LOGIT_BIAS, "Entries of logit_bias.", most=MAX_LOGIT_BIAS)
    max_values: int = _limit(200_000, "Values in one parameter, those inside of its lists and objects among them.")
    header_timeout: float = _limit(10.0, "Seconds in which the headers of a request must have come.")
    body_timeout: float = _limit(60.0, "Seconds in which its body must have come; beyond: 408.")
    request_timeout: float = _limit(3600.0, "Seconds from a request's headers to the end of its answer; beyond: 504.")
    read_timeout: float = _limit(
        30.0, "Seconds for which a client may leave its answer unread; then its connection is closed."
    )
    max_unsent_bytes: int = _limit(64 << 10, "Bytes kept for a client that does not read.")
    max_unread_tokens: int = _limit(
        16384, "Tokens generated for a client that does not read its stream; then the request is ended."
    )

    def __post_init__(self) -> None:
        for name, value, most in ((f.name, getattr(self, f.name), f.metadata["most"]) for f in fields(self)):
            if value is None:
                continue
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} must be above 0, not {value!r}")
            if most is not None and value > most:
                raise ConfigError(f"{name} must be at most {most}, not {value!r}")

    @classmethod
    def names(cls) -> list[str]:
        """The names of all limits."""
        return [each.name for each in fields(cls)]
