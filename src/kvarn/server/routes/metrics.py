"""Numbers for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.responses import Response

from kvarn.engine import AsyncLLM
from kvarn.server.http_numbers import HttpNumbers
from kvarn.server.state import ServerState


def add_metrics(app: FastAPI, state: ServerState, http: HttpNumbers) -> None:
    """Adds the route, which answers at all times: while a model loads, and after its engine has failed."""

    def body(engines: Sequence[tuple[str, AsyncLLM]]) -> bytes:
        # Imported when somebody scrapes: it takes a tenth of a start.
        from kvarn.server.http_collector import HttpCollector
        from kvarn.server.metrics import EngineNumbers, exposition
        from kvarn.server.refusal_collector import RefusalCollector

        numbers = [EngineNumbers.of(name, llm) for name, llm in engines]
        return exposition(numbers, [HttpCollector(http), RefusalCollector(state.refusals)])

    @app.get("/metrics")
    async def metrics() -> Response:
        """Numbers of the engines and the server for Prometheus."""
        # In a thread: a scrape takes milliseconds, in which streams have tokens to send.
        content = await asyncio.to_thread(body, state.engines())
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")
