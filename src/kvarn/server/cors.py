"""CORS: pages of which origins may read answers. None, unless asked."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastapi import FastAPI

from kvarn.errors import ConfigError

_ORIGIN = re.compile(r"\*|https?://(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
TOLD = (
    "x-request-id", "retry-after",
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
)  # fmt: skip
"""Headers of answers that pages may read."""


def check_origins(origins: Sequence[str]) -> None:
    """Raises ConfigError for what is no origin, as browsers send it."""
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            must = "* or a scheme and a host, as https://example.org or http://localhost:3000"
            raise ConfigError(f"cors_origin must be {must}, without a path, not {origin[:80]!r}")


def add_cors(app: FastAPI, origins: Sequence[str]) -> None:
    """Lets pages of these origins ask, with keys in headers; never with cookies, of which there are none."""
    from starlette.middleware.cors import CORSMiddleware

    check_origins(origins)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=list(TOLD),
        max_age=600,
    )
