"""The OpenAI-compatible HTTP server over one `AsyncLLM`."""

from kvarn.server.app import create_app
from kvarn.server.run import ServeOptions, serve

__all__ = ["ServeOptions", "create_app", "serve"]
