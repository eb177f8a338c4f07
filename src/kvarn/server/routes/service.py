"""Routes about the server itself: health, version, metrics, models."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from kvarn import __version__
from kvarn.server.metrics import exposition
from kvarn.server.refusals import RefusalCollector
from kvarn.server.state import ServerState


def add_service_routes(app: FastAPI, state: ServerState) -> None:
    """Adds what needs no generation."""

    @app.get("/health")
    async def health() -> Response:
        """200 once requests are answered, 503 before and after."""
        state.ready()
        return JSONResponse({"status": "ok"})

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The server's version."""
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Numbers of the engine for Prometheus."""
        body = exposition(state.ready().stats(), state.names[0], RefusalCollector(state.refusals))
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")

    def card(name: str) -> dict[str, Any]:
        length = state.ready().max_model_len
        return {"id": name, "object": "model", "created": state.created, "owned_by": "kvarn", "max_model_len": length}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The served model, under each of its names."""
        state.ready()
        return {"object": "list", "data": [card(name) for name in state.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        state.ready()
        return card(state.check_model(name))
