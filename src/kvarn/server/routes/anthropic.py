"""Anthropic's messages."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from kvarn.server.answering import answered, computed
from kvarn.server.asking import asked_chat
from kvarn.server.caller import Caller
from kvarn.server.errors import ApiError
from kvarn.server.messages import MessageAnswer
from kvarn.server.protocol import ChatCompletionRequest
from kvarn.server.protocol.messages import SPELLING, MessagesPrompt, MessagesRequest
from kvarn.server.routes.tokens import prompt_ids
from kvarn.server.spelling import respelt
from kvarn.server.state import Served, ServerState
from kvarn.server.thoughts import thinking_switch


def add_anthropic_routes(app: FastAPI, state: ServerState) -> None:
    """Adds what Anthropic's clients ask for."""

    @app.post("/v1/messages")
    async def messages(request: Request) -> Response:
        """An answer to a conversation, whole or as a stream of typed events, in Anthropic's form."""
        return await answered(request, state, MessagesRequest, _message)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        """How many tokens such a conversation has; nothing is generated."""
        return await computed(request, state, MessagesPrompt, _counted)


def _message(body: MessagesRequest, served: Served, caller: Caller) -> MessageAnswer:
    return MessageAnswer(asked_chat(_chat(body, served), served, caller, "msg_", SPELLING, thinking=True))


def _chat(body: MessagesPrompt, served: Served) -> ChatCompletionRequest:
    chat = body.to_chat()
    chat.chat_template_kwargs = thinking_switch(served.llm.tokenizer, body.thinks, tools=bool(body.tools))
    return chat


def _counted(body: MessagesPrompt, served: Served) -> dict[str, Any]:
    try:
        return {"input_tokens": len(prompt_ids(_chat(body, served), served))}
    except ApiError as error:
        raise respelt(error, SPELLING) from None
