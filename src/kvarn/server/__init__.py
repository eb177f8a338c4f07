"""The HTTP server over one `AsyncLLM`. Imported on first use: limits and keys need no web server."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvarn.server.app import create_app
    from kvarn.server.run import ServeOptions, serve

__all__ = ["ServeOptions", "create_app", "serve"]

_PLACES = {"ServeOptions": "kvarn.server.run", "serve": "kvarn.server.run", "create_app": "kvarn.server.app"}


def __getattr__(name: str) -> object:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'kvarn.server' has no attribute {name!r}")
