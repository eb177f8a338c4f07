"""Answers that end with their client: server-sent events, one write for each step's news, and whole ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvarn.server.dialects import Dialect
from kvarn.server.errors import ApiError, noted
from kvarn.server.record import RequestRecord

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the events back
]
T = TypeVar("T")


class EventStream(Response):
    """Sends the chunks of an iterator as they come, then what ends a stream in the client's dialect.

    The first chunk is awaited before the headers go out, so that a request that fails at once gets a proper status.
    When the client disconnects the iterator is closed, which aborts the engine's work.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], first: bytes | None, dialect: Dialect) -> None:
        """chunks: owned. first: what it gave first; None where it ended at once."""
        super().__init__()
        self._chunks = chunks
        self._first = first
        self._dialect = dialect

    @classmethod
    async def begin(cls, chunks: AsyncGenerator[bytes, None], dialect: Dialect) -> EventStream:
        """Awaits the first chunk. Raises what the iterator raises."""
        return cls(chunks, await anext(chunks, None), dialect)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the end or until the client is gone."""
        async with aclosing(self._chunks):
            sender = asyncio.create_task(self._send(scope["state"]["record"], send))
            listener = asyncio.create_task(disconnected(receive))
            try:
                await asyncio.wait({sender, listener}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (sender, listener):
                    task.cancel()
                await asyncio.gather(sender, listener, return_exceptions=True)

    async def _send(self, record: RequestRecord, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        if self._first is not None:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
        end = self._dialect.end
        try:
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:  # the status is out already: tell it in the stream
            end = self._dialect.failure(noted(error, record))
        await send({"type": "http.response.body", "body": end, "more_body": False})


async def disconnected(receive: Receive) -> None:
    """Returns when the client is gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """Awaits `work`, but cancels it when the client goes away. Raises ApiError 499 then (nobody reads it)."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection")
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
