"""Routes about the server itself: health, version, models."""

from __future__ import annotations

from fastapi import FastAPI

from kvarn import __version__


def add_service_routes(app: FastAPI) -> None:
    """Adds what needs no generation."""

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The server's version."""
        return {"version": __version__}
