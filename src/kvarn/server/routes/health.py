"""Health: whether the process lives, and whether requests should be sent to it."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from kvarn.server.state import ServerState


def add_health(app: FastAPI, state: ServerState) -> None:
    """Adds the routes of probes. They need no key and wait for nothing but the event loop."""

    @app.get("/health/live")
    async def live() -> Response:
        """200 for as long as the server answers at all and no engine hangs (503, where --watchdog-seconds says when one
        does). Else the process should be started again."""
        state.check_alive()
        return JSONResponse({"status": "alive"})

    @app.get("/health/ready")
    async def ready() -> Response:
        """200 while requests are answered; 503 with the reason while the model loads, its engine is brought back, the
        server drains, and after an engine has stopped for good."""
        state.check_ready()
        return JSONResponse({"status": "ready"})

    @app.get("/health")
    async def health() -> Response:
        """200 once requests are answered, 503 before and after: as /health/ready."""
        state.check_ready()
        return JSONResponse({"status": "ok"})
