"""The requests that the server understands, as pydantic models, and what becomes of each parameter.

Every parameter is honoured, refused by name, or ignored because it cannot change an answer; the tables say which. One
that is in none of them is refused as unknown.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from kvarn.request import SamplingParams
from kvarn.server.errors import ApiError

MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 64

HARMLESS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity",
    "prompt_cache_retention",
})  # fmt: skip
"""Accepted and ignored: they name, file or bill a request and cannot change its answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "best_of": (1,),
    "echo": (False,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
    "logit_processors": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "prompt_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "priority": (0,),
    "cache_salt": (),
    "add_special_tokens": (),
    "chat_template": (),
    "documents": ([],),
    "return_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "mm_processor_kwargs": (),
}
"""Not honoured yet: refused by name, unless null or a value that asks for nothing."""


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class SamplingRequest(BaseModel):
    """Parameters that completions and chat completions share. null means absent, as OpenAI has it."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: StrictInt | None = None
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    temperature: StrictFloat | StrictInt | None = None
    top_p: StrictFloat | StrictInt | None = None
    top_k: StrictInt | None = None
    min_p: StrictFloat | StrictInt | None = None
    presence_penalty: StrictFloat | StrictInt | None = None
    frequency_penalty: StrictFloat | StrictInt | None = None
    repetition_penalty: StrictFloat | StrictInt | None = None
    logit_bias: dict[str, StrictFloat | StrictInt] | None = None
    max_tokens: StrictInt | None = None
    min_tokens: StrictInt | None = None
    ignore_eos: StrictBool | None = None
    stop_token_ids: list[StrictInt] | None = None
    skip_special_tokens: StrictBool | None = None
    include_stop_str_in_output: StrictBool | None = None

    def sampling(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """As the engine takes it. Raises RequestError, ApiError naming the parameter."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is for stream: true only", param="stream_options")
        chosen: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "n", "seed", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
                "repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output",
            )
            if getattr(self, name) is not None
        }  # fmt: skip
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            **chosen,
            max_tokens=max_tokens,
            logprobs=logprobs,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=self._bias(),
        )

    def _bias(self) -> dict[int, float]:
        bias = {}
        for token, value in (self.logit_bias or {}).items():
            if not token.isascii() or not token.isdigit() or len(token) > 10:
                raise ApiError(400, f"logit_bias: {token[:40]!r} is no token id", param="logit_bias")
            bias[int(token)] = float(value)
        return bias

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]] = Field(union_mode="left_to_right")
    logprobs: StrictInt | None = None

    def to_sampling(self) -> SamplingParams:
        """As the engine takes it; max_tokens is 16 where absent, as OpenAI has it."""
        return self.sampling(max_tokens=16 if self.max_tokens is None else self.max_tokens, logprobs=self.logprobs)


class ChatCompletionRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = None
    max_completion_tokens: StrictInt | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def to_sampling(self) -> SamplingParams:
        """As the engine takes it; without max_tokens the model's length is the limit."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            message = f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}, not {self.top_logprobs}"
            raise ApiError(400, message, param="top_logprobs")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling(max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


def screen(values: dict[str, Any]) -> dict[str, Any]:
    """The values without harmless parameters and neutral ones. Raises ApiError naming one that is not honoured yet."""
    kept = {}
    for name, value in values.items():
        if name in HARMLESS:
            continue
        if name in NEUTRAL:
            if value is not None and value not in NEUTRAL[name]:
                raise ApiError(400, f"{name} is not supported yet", param=name, code="unsupported_parameter")
            continue
        kept[name] = value
    return kept
