"""The requests that the server honours, as pydantic models, and how they become `SamplingParams`."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    StrictBool,
    StrictInt,
    StrictStr,
    WithJsonSchema,
)  # fmt: skip

from kvarn.engine.beam import BeamParams
from kvarn.errors import RequestError
from kvarn.request import MAX_CACHE_SALT_CHARS, MAX_LOGPROBS, MAX_N, Grammar, SamplingParams
from kvarn.server.errors import ApiError
from kvarn.server.keep_alive import parse_keep_alive
from kvarn.server.keys.records import PRIORITIES
from kvarn.server.protocol.parameters import COMPLETIONS, Screening
from kvarn.server.protocol.structure import ResponseFormat, StructuredOutputs

DEFAULT_COMPLETION_TOKENS = 16
"""`max_tokens` of a completion that does not say, as OpenAI has it."""
MAX_REQUEST_ID_CHARS = 64
REQUEST_ID = re.compile(rf"[A-Za-z0-9_.:-]{{1,{MAX_REQUEST_ID_CHARS}}}")
MAX_PROMPTS = 64
"""In one completion request."""
MOST_PROMPTS = 2048
"""In any request."""
SAMPLING_FIELDS = (
    "n", "seed", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output",
    "num_speculative_tokens", "prompt_logprobs",
)  # fmt: skip
"""Fields that `SamplingParams` has under the same name; its defaults hold where they are absent or null."""


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise ValueError("must be a string or a list of strings")


def _priority(value: int) -> int:
    if -PRIORITIES <= value < PRIORITIES:
        return value
    raise ValueError(f"must be between {-PRIORITIES} and {PRIORITIES - 1}, not {value}")


def _prompt(value: Any) -> Any:
    """As it is. The kinds of all items are looked at in one pass: a prompt may have millions.

    Not those of the items of too many prompts, which `PromptEncoder` refuses by their number.
    """
    if isinstance(value, str):
        return value
    kinds = set(map(type, value)) if isinstance(value, list) else {None}
    if kinds <= {str} or kinds == {int}:
        return value
    if kinds == {list} and (len(value) > MOST_PROMPTS or all(set(map(type, ids)) <= {int} for ids in value)):
        return value
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _schema(*kinds: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(kinds)})


_TEXT, _IDS = {"type": "string"}, {"type": "array", "items": {"type": "integer"}}
_TEXTS = {"type": "array", "items": _TEXT}
Number = Annotated[float, Strict()]
Priority = Annotated[StrictInt, AfterValidator(_priority)]
Stop = Annotated[tuple[str, ...], PlainValidator(_stop), _schema(_TEXT, _TEXTS, {"type": "null"})]
Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_prompt),
    _schema(_TEXT, _TEXTS, _IDS, {"type": "array", "items": _IDS}),
]


KeepAlive = Annotated[
    float | None,
    PlainValidator(lambda value: None if value is None else parse_keep_alive(value)),
    _schema(_TEXT, {"type": "number"}, {"type": "null"}),
]


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None
    """vLLM's: every event has the usage so far."""


class ModelRequest(BaseModel):
    """What every request has."""

    model_config = ConfigDict(extra="forbid")
    screening: ClassVar[Screening] = COMPLETIONS
    """What becomes of parameters that it has not."""
    model: StrictStr | None = None
    keep_alive: KeepAlive = None
    """Seconds that the model stays in memory after its last request, as Ollama has it; None: as before."""


class AnswerRequest(ModelRequest):
    """What every request for an answer has."""

    stream: StrictBool | None = None


class SamplingRequest(AnswerRequest):
    """Parameters that completions and chat completions share. null means absent, as OpenAI has it.

    Lists are validated up to the first item that is wrong, so that a hostile body costs no more than reading it.
    """

    stream_options: StreamOptions | None = None
    n: StrictInt | None = None
    seed: StrictInt | None = None
    stop: Stop = ()
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    max_tokens: StrictInt | None = None
    min_tokens: StrictInt | None = None
    ignore_eos: StrictBool | None = None
    stop_token_ids: list[StrictInt] | None = Field(None, fail_fast=True)
    allowed_token_ids: list[StrictInt] | None = Field(None, fail_fast=True)
    bad_words: list[StrictStr] | None = Field(None, fail_fast=True)
    skip_special_tokens: StrictBool | None = None
    include_stop_str_in_output: StrictBool | None = None
    num_speculative_tokens: StrictInt | None = None
    """vLLM's name; there it is the server's alone."""
    priority: Priority | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    best_of: StrictInt | None = None
    """Answers that are made of each prompt, the n best of which are told; with beam search its width."""
    use_beam_search: StrictBool | None = None
    length_penalty: Number | None = None
    """Of beam search."""
    truncate_prompt_tokens: StrictInt | None = None
    """Keeps the last so many tokens of a prompt; -1: as many as leave room for the answer."""
    return_token_ids: StrictBool | None = None
    return_tokens_as_token_ids: StrictBool | None = None
    prompt_logprobs: StrictInt | None = None
    request_id: StrictStr | None = None
    """What the answer's id ends with."""
    cache_salt: StrictStr | None = None
    """Cached prefixes are shared only between requests with the same salt (vLLM has it, too)."""

    def _sampling(self, *, max_tokens: int | None, logprobs: int | None, **more: Any) -> SamplingParams:
        """more: in place of fields of the same name."""
        self._check_stream_options()
        if self.prompt_logprobs is not None and self.stream:
            message = "prompt_logprobs are not told in a stream"
            raise ApiError(400, message, param="prompt_logprobs", code="unsupported_parameter")
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS if getattr(self, name) is not None}
        return SamplingParams(
            **{**given, **more},
            max_tokens=max_tokens,
            logprobs=logprobs,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=self._bias(),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            bad_words=tuple(self.bad_words or ()),
            grammar=self.grammar,
        )

    @property
    def grammar(self) -> Grammar | None:
        """What the answer must be. Raises ApiError naming the parameter."""
        if self.structured_outputs is None:
            return None if self.response_format is None else self.response_format.to_grammar()
        if self.response_format is not None and self.response_format.type != "text":
            message = "structured_outputs and response_format exclude one another"
            raise ApiError(400, message, param="structured_outputs", code="invalid_value")
        return self.structured_outputs.to_grammar()

    @property
    def num_answers(self) -> int:
        """That are told of each prompt."""
        return 1 if self.n is None else self.n

    @property
    def chooses(self) -> bool:
        """Whether more answers are drawn than told."""
        return not self.use_beam_search and self.best_of is not None and self.best_of != self.num_answers

    def beams(self) -> BeamParams | None:
        """How to search for the answers; None: they are drawn. Raises ApiError, RequestError."""
        penalty = 1.0 if self.length_penalty is None else self.length_penalty
        if not self.use_beam_search:
            if penalty != 1:
                message = "length_penalty is for use_beam_search: true only"
                raise ApiError(400, message, param="length_penalty", code="invalid_value")
            return None
        if self.stream:
            message = "use_beam_search cannot be streamed: which beams are best is known at the end"
            raise ApiError(400, message, param="use_beam_search", code="unsupported_parameter")
        return BeamParams(self.num_answers if self.best_of is None else self.best_of, penalty)

    def given_id(self, prefix: str) -> str | None:
        """The id that the client chose for the answer, after a prefix. Raises ApiError naming `request_id`."""
        if self.request_id is None:
            return None
        if not REQUEST_ID.fullmatch(self.request_id):
            message = f"request_id must be 1 to {MAX_REQUEST_ID_CHARS} letters, digits and _ . : -"
            raise ApiError(400, message, param="request_id", code="invalid_value")
        return f"{prefix}{self.request_id}"

    def prompt_limit(self, max_model_len: int) -> int | None:
        """Tokens that are kept of a prompt, its last ones; None: all. Raises ApiError for a number that is none."""
        count = self.truncate_prompt_tokens
        if count is not None and count < 1 and count != -1:
            message = f"truncate_prompt_tokens must be at least 1, or -1, not {count}"
            raise ApiError(400, message, param="truncate_prompt_tokens", code="invalid_value")
        return max(1, max_model_len - max(1, self.output_limit or 1)) if count == -1 else count

    @property
    def salt(self) -> str:
        """`cache_salt`, or "" without one. Raises ApiError for an empty one, by which its sender meant a secret."""
        if self.cache_salt == "":
            message = f"cache_salt must have 1 to {MAX_CACHE_SALT_CHARS} characters; leave it out for none"
            raise ApiError(400, message, param="cache_salt", code="invalid_value")
        return self.cache_salt or ""

    def _check_stream_options(self) -> None:
        if self.stream_options is None:
            return
        if not self.stream:
            raise ApiError(400, "stream_options is for stream: true only", param="stream_options", code="invalid_value")
        if self.stream_options.include_obfuscation:
            name = "stream_options.include_obfuscation"
            raise ApiError(400, f"{name} is not supported yet", param=name, code="unsupported_parameter")

    def _bias(self) -> dict[int, float]:
        bias: dict[int, float] = {}
        for token, value in (self.logit_bias or {}).items():
            if not token.isascii() or not token.isdigit() or len(token) > 10:
                message = f"logit_bias must be keyed by token ids, not {token[:40]!r}"
                raise ApiError(400, message, param="logit_bias", code="invalid_value")
            bias[int(token)] = value
        return bias

    @property
    def output_limit(self) -> int | None:
        """Most tokens of an answer; None: as many as there is room for."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of the stream has the usage so far, too."""
        options = self.stream_options
        return options is not None and bool(options.include_usage and options.continuous_usage_stats)

    def refusal(self, error: RequestError) -> ApiError:
        """The error with the parameter named as the client spelt it."""
        field = error.field
        if field == "grammar":
            field = "response_format" if self.structured_outputs is None else "structured_outputs"
        return ApiError(400, str(error), param=field, code="invalid_value")


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: Prompt
    logprobs: StrictInt | None = None
    echo: StrictBool | None = None
    add_special_tokens: StrictBool | None = None

    def to_sampling(self) -> SamplingParams:
        """As the engine takes it. Raises RequestError, ApiError naming the parameter."""
        more: dict[str, Any] = {}
        logprobs = self.logprobs
        if self.chooses:
            more["n"], logprobs = self._width(), logprobs or 0
        if self.echo and self.logprobs is not None:
            more["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        # The engine makes a token in any case; where none is wanted it is not told.
        limit = 1 if self.echoes_only else self.output_limit
        return self._sampling(max_tokens=limit, logprobs=logprobs, **more)

    @property
    def echoes_only(self) -> bool:
        """Whether nothing but the prompt is to be told."""
        return bool(self.echo) and self.max_tokens == 0

    def _width(self) -> int:
        width = self.best_of or 0
        if not self.num_answers <= width <= MAX_N:
            message = f"best_of must be between n ({self.num_answers}) and {MAX_N}, not {width}"
            raise ApiError(400, message, param="best_of", code="invalid_value")
        if self.stream:
            message = "best_of above n cannot be streamed: which answers are best is known at the end"
            raise ApiError(400, message, param="best_of", code="unsupported_parameter")
        return width

    @property
    def output_limit(self) -> int:
        """Most tokens of an answer."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


class ChatCompletionRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(fail_fast=True)
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = None
    max_completion_tokens: StrictInt | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    tools: list[dict[str, Any]] | None = Field(None, fail_fast=True)
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = Field(None, fail_fast=True)
    """For templates that have a place for them."""
    reasoning_effort: StrictStr | None = None
    include_reasoning: StrictBool | None = None
    """vLLM's: false: thoughts are not told."""

    def to_sampling(self) -> SamplingParams:
        """As the engine takes it; without max_tokens the model's length is the limit.

        Raises RequestError, ApiError naming the parameter.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            message = f"top_logprobs must be between 0 and {MAX_LOGPROBS}, not {self.top_logprobs}"
            raise ApiError(400, message, param="top_logprobs", code="invalid_value")
        self.check_end()
        if self.chooses and self.best_of != 1:
            message = "best_of is for completions, or for use_beam_search: true"
            raise ApiError(400, message, param="best_of", code="unsupported_parameter")
        limit, other = self.max_completion_tokens, self.max_tokens
        if limit is not None and other is not None and limit != other:
            message = f"max_tokens ({other}) and max_completion_tokens ({limit}) are one limit: give one of them"
            raise ApiError(400, message, param="max_tokens", code="invalid_value")
        return self._sampling(
            max_tokens=self.output_limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    @property
    def output_limit(self) -> int | None:
        """Most tokens of an answer; None: as many as there is room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template is given beside the conversation."""
        documents = {"documents": self.documents} if self.documents else {}
        return {**(self.chat_template_kwargs or {}), **documents}

    def check_end(self) -> None:
        """Raises ApiError where it is not clear what the prompt ends with."""
        if self.continue_final_message and self.add_generation_prompt:
            message = "add_generation_prompt and continue_final_message exclude one another"
            raise ApiError(400, message, param="add_generation_prompt", code="invalid_value")

    def refusal(self, error: RequestError) -> ApiError:
        """The error with the parameter named as the client spelt it."""
        message, field = str(error), error.field
        if field == "chat_template_kwargs.documents" and self.documents:
            field = "documents"
        if field == "grammar" and self.grammar is None:
            return ApiError(400, message, param="tools", code="invalid_value")
        if field == "max_tokens" and self.max_completion_tokens is not None:
            message, field = message.replace("max_tokens", "max_completion_tokens"), "max_completion_tokens"
        return super().refusal(RequestError(message, field="messages" if field == "prompt" else field))
