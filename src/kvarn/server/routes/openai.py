"""OpenAI's completions and chat completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastapi import FastAPI, Request
from fastapi.responses import Response

from kvarn.engine import AsyncLLM
from kvarn.errors import RequestError
from kvarn.server.answering import answered
from kvarn.server.caller import Caller
from kvarn.server.chat import ChatAnswer
from kvarn.server.completions import CompletionAnswer
from kvarn.server.documented import documented
from kvarn.server.generation import Generation, new_id
from kvarn.server.protocol import ChatCompletionRequest, CompletionRequest
from kvarn.server.state import Served, ServerState
from kvarn.server.tools import ToolUse


def add_openai_routes(app: FastAPI, state: ServerState) -> None:
    """Adds what generates text in OpenAI's forms."""

    @app.post("/v1/chat/completions", openapi_extra=documented(ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        """An answer to a conversation, whole or as a stream of server-sent events."""
        return await answered(request, state, ChatCompletionRequest, _chat)

    @app.post("/v1/completions", openapi_extra=documented(CompletionRequest))
    async def text_completions(request: Request) -> Response:
        """The continuation of one or several texts, whole or as a stream of server-sent events."""
        return await answered(request, state, CompletionRequest, _completion)


def _chat(body: ChatCompletionRequest, served: Served, caller: Caller) -> ChatAnswer:
    tokenizer = served.llm.tokenizer
    tools = ToolUse.of(body.tools, body.tool_choice, body.parallel_tool_calls, tokenizer)
    generation = _generation(served.llm, caller, served.prompts.chat(body, tools), body, "chatcmpl", tools)
    return ChatAnswer(body, generation, tokenizer, served.name, tools)


def _completion(body: CompletionRequest, served: Served, caller: Caller) -> CompletionAnswer:
    generation = _generation(served.llm, caller, served.prompts.completion(body), body, "cmpl")
    return CompletionAnswer(body, generation, served.llm.tokenizer, served.name)


def _generation(
    llm: AsyncLLM,
    caller: Caller,
    prompts: Iterator[Sequence[int]],
    body: ChatCompletionRequest | CompletionRequest,
    kind: str,
    tools: ToolUse | None = None,
) -> Generation:
    """What the body asks for. Raises ApiError, parameters named as the client spelt them."""
    try:
        sampling = body.to_sampling()
        if tools is not None:
            sampling = tools.bind(sampling)
        return Generation(
            llm, prompts, sampling, new_id(kind), caller, priority=body.priority, cache_salt=body.salt,
            refusal=body.refusal,
        )  # fmt: skip
    except RequestError as error:
        raise body.refusal(error) from None
