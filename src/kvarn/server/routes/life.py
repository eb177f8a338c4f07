"""What an administrator may do with the server's life and its models. Routes of the admin listener, not of the API."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import FastAPI

from kvarn.server.models import ModelStatus
from kvarn.server.state import ServerState


def add_life_routes(app: FastAPI, state: ServerState) -> None:
    """Adds draining, and loading and unloading models."""

    def draining() -> dict[str, Any]:
        return {"draining": state.door.is_closed, "in_flight": state.door.inside}

    @app.get("/admin/drain")
    async def drain_status() -> dict[str, Any]:
        """Whether new requests are refused, and how many are being answered."""
        return draining()

    @app.post("/admin/drain")
    async def drain(wait: bool = False) -> dict[str, Any]:
        """Refuses new requests, as SIGTERM does, but the process goes on. wait: answers when none is left."""
        if wait:
            await state.drain()
        state.door.close()
        return draining()

    @app.post("/admin/resume")
    async def resume() -> dict[str, Any]:
        """Takes requests again, after a drain that no signal began."""
        state.resume()
        return draining()

    @app.get("/admin/models")
    async def models() -> dict[str, Any]:
        """All models: where they are, what they take, who has them and who waits for them."""
        found = [_card(status) for status in state.models.statuses()]
        return {"models": found, "held_bytes": state.models.held_bytes, "budget_bytes": state.models.budget}

    @app.post("/admin/models/{name:path}/load")
    async def load(name: str) -> dict[str, Any]:
        """Loads a model, anew where its engine has stopped; answers when it is there. 503 where it cannot be."""
        await state.models.load(name)
        return _card(state.models.status(name))

    @app.post("/admin/models/{name:path}/unload")
    async def unload(name: str) -> dict[str, Any]:
        """Unloads a model, once the requests that have it are answered; answers then. 409 while it is loading."""
        await state.models.unload(name)
        return _card(state.models.status(name))


def _card(status: ModelStatus) -> dict[str, Any]:
    seconds = status.keep_seconds
    return {**asdict(status), "state": status.state.value, "keep_seconds": seconds if seconds < float("inf") else None}
