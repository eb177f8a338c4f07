"""Numbers for Prometheus."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from fastapi.responses import Response

from kvarn.server.http_numbers import HttpNumbers
from kvarn.server.state import ServerState


def add_metrics(app: FastAPI, state: ServerState, http: HttpNumbers) -> None:
    """Adds the route, which answers at all times: while a model loads, and after its engine has failed."""

    def body() -> bytes:
        # Imported when somebody scrapes: it takes a tenth of a start.
        from kvarn.server.http_collector import HttpCollector
        from kvarn.server.metrics import EngineNumbers, exposition

        engines = [] if state.llm is None else [EngineNumbers.of(state.names[0], state.llm)]
        return exposition(engines, [HttpCollector(http)])

    @app.get("/metrics")
    async def metrics() -> Response:
        """Numbers of the engine and the server for Prometheus."""
        # In a thread: a scrape takes milliseconds, in which streams have tokens to send.
        return Response(await asyncio.to_thread(body), media_type="text/plain; version=0.0.4; charset=utf-8")
