"""The models that may be asked for."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from kvarn.server.state import ServerState


def add_models(app: FastAPI, state: ServerState) -> None:
    """Adds what lists models."""

    def card(name: str) -> dict[str, Any]:
        status = state.models.status(name)
        lengths = {loaded: llm.max_model_len for loaded, llm in state.engines()}
        return {
            "id": name, "object": "model", "created": state.created, "owned_by": "kvarn",
            "max_model_len": lengths.get(status.name, status.max_model_len), "state": status.state.value,
        }  # fmt: skip

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The served models, each under all of its names, and whether they are in memory."""
        state.ready()
        return {"object": "list", "data": [card(name) for name in state.models.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        state.ready()
        return card(state.models.check_name(name))
