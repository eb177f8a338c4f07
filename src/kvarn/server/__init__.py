"""The OpenAI-compatible HTTP server over a pool of models, each an `AsyncLLM`."""

from kvarn.server.app import create_app
from kvarn.server.models.hosted import ModelSpec
from kvarn.server.run import ServeOptions, Told, serve

__all__ = ["ModelSpec", "ServeOptions", "Told", "create_app", "serve"]
