"""`Door`: who is inside, and whether newcomers are let in. To drain is to close it and wait until nobody is left."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from starlette.types import ASGIApp, Receive, Scope, Send

from kvarn.server.errors import RETRY_SECONDS, ApiError

WORK = "POST"
"""The method of requests that ask for work. Others only look, and are answered to the end."""


class Door:
    """Counts the requests for work that are not answered to their end. For one event loop.

    `close` and `open` may be called from a signal handler."""

    def __init__(self) -> None:
        self.is_closed = False
        self._inside = 0
        self._left = asyncio.Event()

    @property
    def inside(self) -> int:
        """Requests that came in and are not answered to the end."""
        return self._inside

    def close(self) -> None:
        """From now on nobody comes in."""
        self.is_closed = True

    def open(self) -> None:
        """Newcomers are let in again."""
        self.is_closed = False

    def enter(self) -> None:
        """Raises ApiError 503 where the door is closed."""
        if self.is_closed:
            headers = {"Retry-After": RETRY_SECONDS, "Connection": "close"}
            message = "the server is draining: it finishes what it has and takes no new requests"
            raise ApiError(503, message, code="draining", headers=headers)
        self._inside += 1

    def leave(self) -> None:
        """Who has entered is done."""
        self._inside -= 1
        if not self._inside:
            self._left.set()

    async def empty(self) -> None:
        """Returns when nobody is inside."""
        while self._inside:
            self._left.clear()
            await self._left.wait()


class Doorway:
    """ASGI middleware: requests for work pass the door, and leave when their answer is sent or their client is gone.

    What is to be given back then is registered in `request.state.ended`, an ExitStack.
    """

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on. Raises ApiError 503 where the door is closed."""
        if scope["type"] != "http" or scope["method"] != WORK:
            await self._app(scope, receive, send)
            return
        self._door.enter()
        with ExitStack() as ended:
            ended.callback(self._door.leave)
            scope.setdefault("state", {})["ended"] = ended
            await self._app(scope, receive, send)
