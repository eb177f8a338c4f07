"""Requests about tokens, for which nothing is generated, in vLLM's form."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, StrictBool, StrictStr, WithJsonSchema

from kvarn.errors import RequestError
from kvarn.server.errors import ApiError
from kvarn.server.protocol.requests import ChatCompletionRequest, CompletionRequest, ModelRequest


def _ids(value: Any) -> list[int]:
    """As it is. The kinds of all items are looked at in one pass."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise ValueError("must be a list of token ids")
    return value


TokenIds = Annotated[
    list[int],
    PlainValidator(_ids),
    WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}),
]


class TokenizeRequest(ModelRequest):
    """POST /tokenize: a text (`prompt`) or a conversation (`messages`)."""

    prompt: StrictStr | None = None
    add_special_tokens: StrictBool | None = None
    messages: list[dict[str, Any]] | None = Field(None, fail_fast=True)
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    tools: list[dict[str, Any]] | None = Field(None, fail_fast=True)
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: StrictBool | None = None

    def understood(self) -> CompletionRequest | ChatCompletionRequest:
        """The request for an answer that would have this prompt. Raises ApiError naming the parameter."""
        if (self.prompt is None) == (self.messages is None):
            raise _wrong("prompt", "is missing, and so is messages" if self.prompt is None else "excludes messages")
        if self.messages is None:
            for name in ("add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs"):
                if getattr(self, name):
                    raise _wrong(name, "is for messages only")
            given = {"prompt": self.prompt, "add_special_tokens": self.add_special_tokens}
            return CompletionRequest.model_validate(given)
        if self.add_special_tokens:
            raise _wrong("add_special_tokens", "is for prompt only: the chat template has those of a conversation")
        names = {"messages", "add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs"}
        chat = ChatCompletionRequest.model_validate(self.model_dump(include=names))
        chat.check_end()
        return chat


class DetokenizeRequest(ModelRequest):
    """POST /detokenize."""

    tokens: TokenIds

    def check(self, vocab_size: int) -> None:
        """Raises RequestError for what is no token."""
        wrong = next((token for token in self.tokens if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise RequestError(f"tokens: token ids are 0 to {vocab_size - 1}, not {wrong}", field="tokens")


def _wrong(name: str, what: str) -> ApiError:
    return ApiError(400, f"{name} {what}", param=name, code="invalid_value")
