"""Tokens without an answer: tokenize, detokenize, and what a conversation counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from kvarn.errors import RequestError
from kvarn.server.answering import computed
from kvarn.server.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from kvarn.server.state import Served, ServerState
from kvarn.server.tools import ToolUse


def add_token_routes(app: FastAPI, state: ServerState) -> None:
    """Adds what only the tokenizer is needed for."""

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        """Token ids of a text or a conversation, and how many the model takes."""
        return await computed(request, state, TokenizeRequest, _tokenized)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens as they are spelt."""
        return await computed(request, state, DetokenizeRequest, _detokenized)

    @app.post("/v1/chat/completions/input_tokens")
    async def input_tokens(request: Request) -> Response:
        """How many tokens the prompt of a chat completion has. Takes the whole request; only the prompt counts."""
        return await computed(request, state, ChatCompletionRequest, _counted)


def _tokenized(body: TokenizeRequest, served: Served) -> dict[str, Any]:
    ids = prompt_ids(body.understood(), served)
    tokenizer = served.llm.tokenizer
    return {
        "count": len(ids),
        "max_model_len": served.llm.max_model_len,
        "tokens": list(ids),
        "token_strs": [tokenizer.token_text(token) for token in ids] if body.return_token_strs else None,
    }


def _detokenized(body: DetokenizeRequest, served: Served) -> dict[str, Any]:
    body.check(served.llm.tokenizer.vocab_size)
    return {"prompt": served.llm.tokenizer.decode(body.tokens, skip_special_tokens=False)}


def _counted(body: ChatCompletionRequest, served: Served) -> dict[str, Any]:
    return {"object": "response.input_tokens", "input_tokens": len(prompt_ids(body, served))}


def prompt_ids(body: ChatCompletionRequest | CompletionRequest, served: Served) -> Sequence[int]:
    """The prompt of a request that has one. Raises ApiError, the parameter named as the client spelt it."""
    try:
        if isinstance(body, CompletionRequest):
            return next(iter(served.prompts.completion(body)))
        body.to_sampling()  # what would be refused as a request is refused here
        tools = ToolUse.of(body.tools, body.tool_choice, body.parallel_tool_calls, served.llm.tokenizer)
        return next(iter(served.prompts.chat(body, tools)))
    except RequestError as error:
        raise body.refusal(error) from None
