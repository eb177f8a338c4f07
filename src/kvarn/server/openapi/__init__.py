"""What /openapi.json says. Made when it is asked for first: a server that nobody asks does not pay for it."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import FastAPI


def install(app: FastAPI) -> None:
    """Makes the app's document that of `document_of`."""

    @cache
    def document() -> dict[str, Any]:
        from kvarn.server.openapi.document import document_of

        return document_of(app)

    app.openapi = document  # type: ignore[method-assign]
