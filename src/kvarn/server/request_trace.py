"""The seam between generation and spans: who hears of each output of a request. By default nobody does."""

from __future__ import annotations

from typing import Protocol

from kvarn.request import Request, RequestOutput


class RequestTrace(Protocol):
    """Of one request over HTTP, which may have several of the engine's."""

    def output(self, model: str, request: Request, output: RequestOutput) -> None:
        """One of the engine's requests got on. Called in the event loop, for every output: must return at once."""
        ...


class Untraced:
    """Hears of nothing."""

    def output(self, model: str, request: Request, output: RequestOutput) -> None:
        """Nothing."""


UNTRACED = Untraced()
