"""OpenAI's responses, of which nothing is kept."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

from kvarn.server.answering import answered
from kvarn.server.asking import asked_chat
from kvarn.server.caller import Caller
from kvarn.server.protocol.responses import SPELLING, ResponsesRequest
from kvarn.server.responses import ResponseAnswer
from kvarn.server.state import Served, ServerState


def add_response_routes(app: FastAPI, state: ServerState) -> None:
    """Adds POST /v1/responses."""

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        """An answer to a conversation, whole or as a stream of typed events; nothing of it is stored."""
        return await answered(request, state, ResponsesRequest, _response)


def _response(body: ResponsesRequest, served: Served, caller: Caller) -> ResponseAnswer:
    return ResponseAnswer(body, asked_chat(body.to_chat(), served, caller, "resp_", SPELLING, thinking=True))
