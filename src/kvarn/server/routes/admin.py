"""Routes of the admin listener: what changes the server for everybody. They are not among those of the API."""

from __future__ import annotations

from fastapi import FastAPI

from kvarn.server.state import ServerState


def add_admin_routes(app: FastAPI, state: ServerState) -> None:
    """Adds what an administrator may do. All are POST, but for what only tells."""

    @app.post("/admin/cache/reset")
    async def reset_cache() -> dict[str, int]:
        """Drops the cached prefixes that no running request holds, in the second tier too."""
        state.ready()
        return {"freed_blocks": sum([await llm.forget_cached() for _, llm in state.engines()])}
