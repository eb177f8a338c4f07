"""How requests over HTTP were answered: by route and status, and how long it took."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvarn.engine.histogram import Histogram, HistogramSnapshot

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
METHODS = frozenset(("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"))
ELSEWHERE = "other"
"""For paths and methods that have no route: what clients make up must not make new time series."""
GONE = 499
"""In place of a status where the client left before there was one."""


class HttpNumbers:
    """Counts of one application. The event loop's thread writes; any may read."""

    def __init__(self) -> None:
        self._responses: Counter[tuple[str, str, str]] = Counter()
        self._seconds: dict[tuple[str, str], Histogram] = {}

    def answered(self, handler: str, method: str, status: int, seconds: float) -> None:
        """One request is done with. handler: the route's path. seconds: until the last byte was written."""
        self._responses[handler, method, str(status)] += 1
        key = handler, f"{status // 100}xx"
        if key not in self._seconds:
            self._seconds[key] = Histogram(SECONDS)
        self._seconds[key].observe(seconds)

    @property
    def responses(self) -> Mapping[tuple[str, str, str], int]:
        """By route, method and status."""
        return MappingProxyType(self._responses.copy())

    @property
    def seconds(self) -> Mapping[tuple[str, str], HistogramSnapshot]:
        """By route and class of status, such as 4xx."""
        return {key: histogram.snapshot() for key, histogram in self._seconds.copy().items()}


class HttpCounting:
    """ASGI middleware that tells `HttpNumbers` of every request. The outermost: what others refuse counts, too."""

    def __init__(self, app: ASGIApp, numbers: HttpNumbers, clock: Callable[[], float] = time.perf_counter) -> None:
        self._app = app
        self._numbers = numbers
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = self._clock(), GONE

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = 500  # what is outside of all middleware answers so
            raise
        finally:
            route = getattr(scope.get("route"), "path", ELSEWHERE)
            method = scope["method"] if scope["method"] in METHODS else ELSEWHERE
            self._numbers.answered(route, method, status, self._clock() - began)
