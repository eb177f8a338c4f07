"""What the dashboard shows: one snapshot of the server, as JSON. The page keeps the last minutes of them itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI

from kvarn import __version__
from kvarn.engine import AsyncLLM, EngineStats
from kvarn.server.state import ServerState

COUNTERS = (
    "steps", "prompt_tokens", "generated_tokens", "preemptions", "failed_steps", "prefix_queries", "prefix_hits",
    "draft_tokens", "accepted_tokens",
)  # fmt: skip
"""Those of `EngineStats` that the page takes differences of."""
HISTOGRAMS: Mapping[str, str] = {
    "ttft": "time_to_first_token_seconds",
    "itl": "inter_token_latency_seconds",
    "e2e": "e2e_request_latency_seconds",
    "queue": "request_queue_time_seconds",
}
"""The page's names for histograms of `EngineStats`, in seconds."""


def add_dashboard(app: FastAPI, state: ServerState) -> None:
    """Adds the route behind the page at /dashboard."""

    @app.get("/dashboard/state")
    async def dashboard_state() -> dict[str, Any]:
        """A snapshot of the server for its dashboard; also while a model loads."""
        return {
            "version": __version__,
            "time": time.monotonic(),
            "uptime": time.time() - state.created,
            "models": _models(state),
            "tenants": [asdict(load) for load in state.loads.snapshot()],
        }


def _models(state: ServerState) -> list[dict[str, Any]]:
    """Each model's part of the snapshot. One that is not in memory has zeros."""
    engines = dict(state.engines())
    return [
        {"name": status.name, "state": status.state.value, **_numbers(engines.get(status.name))}
        for status in state.models.statuses()
    ]


def _numbers(llm: AsyncLLM | None) -> dict[str, Any]:
    """An engine's numbers. Blocks are used by sequences, cached for later ones, or free."""
    stats = EngineStats() if llm is None else llm.stats()
    return {
        "max_running": 0 if llm is None else llm.config.scheduler.max_num_seqs,
        "running": stats.running,
        "waiting": stats.waiting,
        "queued_tokens": stats.queued_tokens,
        "blocks": {
            "used": stats.num_blocks - stats.free_blocks,
            "cached": stats.cached_blocks,
            "free": stats.free_blocks - stats.cached_blocks,
        },
        "counters": {name: getattr(stats, name) for name in COUNTERS},
        "rejections": dict(stats.rejections),
        "histograms": {
            name: {"bounds": found.bounds, "counts": found.counts}
            for name, found in ((name, stats.histograms[of]) for name, of in HISTOGRAMS.items())
        },
    }
