"""OpenAI's completions and chat completions."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

from kvarn.server.answering import answered
from kvarn.server.asking import asked, asked_chat
from kvarn.server.caller import Caller
from kvarn.server.chat import ChatAnswer
from kvarn.server.completions import CompletionAnswer
from kvarn.server.protocol import ChatCompletionRequest, CompletionRequest
from kvarn.server.state import Served, ServerState


def add_openai_routes(app: FastAPI, state: ServerState) -> None:
    """Adds what generates text in OpenAI's forms."""

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """An answer to a conversation, whole or as a stream of server-sent events."""
        return await answered(request, state, ChatCompletionRequest, _chat)

    @app.post("/v1/completions")
    async def text_completions(request: Request) -> Response:
        """The continuation of one or several texts, whole or as a stream of server-sent events."""
        return await answered(request, state, CompletionRequest, _completion)


def _chat(body: ChatCompletionRequest, served: Served, caller: Caller) -> ChatAnswer:
    return ChatAnswer(body, asked_chat(body, served, caller, "chatcmpl-", thinking=True))


def _completion(body: CompletionRequest, served: Served, caller: Caller) -> CompletionAnswer:
    generation = asked(body, served.prompts.completion(body), served, caller, "cmpl-")
    return CompletionAnswer(body, generation, served.llm.tokenizer, served.name)
