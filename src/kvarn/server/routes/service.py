"""Routes about the server itself: health, version, metrics, models."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import Response

from kvarn import __version__
from kvarn.server.metrics import exposition
from kvarn.server.refusals import RefusalCollector
from kvarn.server.state import ServerState


def add_service_routes(app: FastAPI, state: ServerState) -> None:
    """Adds what needs no generation."""

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The server's version."""
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Numbers of the engines for Prometheus."""
        state.ready()
        name, llm = state.engines()[0]
        body = exposition(llm.stats(), name, RefusalCollector(state.refusals))
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")
