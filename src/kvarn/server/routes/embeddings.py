"""OpenAI's embeddings."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

from kvarn.request import Pooling
from kvarn.server.answering import answered_whole
from kvarn.server.caller import Caller
from kvarn.server.embeddings import EmbeddingAnswer, asked_embeddings
from kvarn.server.protocol import EmbeddingRequest
from kvarn.server.state import Served, ServerState


def add_embedding_routes(app: FastAPI, state: ServerState, pooling: Pooling) -> None:
    """Adds what makes vectors of texts. pooling: of requests that do not say."""

    def understand(body: EmbeddingRequest, served: Served, caller: Caller) -> EmbeddingAnswer:
        return asked_embeddings(body, served, caller, pooling)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        """A vector for each of one or several texts, of the loaded model's last hidden states."""
        return await answered_whole(request, state, EmbeddingRequest, understand)
