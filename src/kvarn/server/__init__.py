"""The HTTP server over a pool of models. Imported on first use: limits and keys need no web server."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvarn.server.app import create_app
    from kvarn.server.models.hosted import ModelSpec
    from kvarn.server.run import ServeOptions, Told, serve

__all__ = ["ModelSpec", "ServeOptions", "Told", "create_app", "serve"]

_PLACES = {
    "ModelSpec": "kvarn.server.models.hosted", "ServeOptions": "kvarn.server.run", "Told": "kvarn.server.run",
    "create_app": "kvarn.server.app", "serve": "kvarn.server.run",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'kvarn.server' has no attribute {name!r}")
