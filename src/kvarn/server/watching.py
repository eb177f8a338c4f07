"""Who wants to know of every request over HTTP, from its first byte to its last: numbers, spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = frozenset(("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"))
ELSEWHERE = "other"
"""For paths and methods that have no route: what clients make up must not make new time series or names."""
GONE = 499
"""In place of a status where the client left before there was one."""


class Watch(Protocol):
    """Of one request."""

    def ended(self, route: str, method: str, status: int) -> None:
        """The last byte is written, or the client is gone. route: the route's path, or `ELSEWHERE`. Called once."""
        ...


class HttpWatcher(Protocol):
    """Called in the event loop; must return soon and raise nothing."""

    def begun(self, scope: Scope) -> Watch:
        """A request has come."""
        ...


class Watched:
    """ASGI middleware that tells `HttpWatcher`s. The outermost, so that they see what others refuse, too."""

    def __init__(self, app: ASGIApp, watchers: Sequence[HttpWatcher]) -> None:
        self._app = app
        self._watchers = watchers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        watches = [watcher.begun(scope) for watcher in self._watchers]
        status = GONE

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
            for watch in watches:
                watch.ended(route, method, status)
