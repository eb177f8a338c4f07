"""The way of a generation request, whichever client's form it has: body, model, prompt, answer, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from kvarn.server.body import check_entries, parse
from kvarn.server.caller import Caller
from kvarn.server.protocol import ModelRequest
from kvarn.server.sse import EventStream, unless_disconnected
from kvarn.server.state import Served, ServerState


class Reply(Protocol):
    """An answer in one client's form. One of the two is called, once."""

    async def whole(self) -> dict[str, Any]:
        """The JSON body, once everything is there."""

    def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events as they come."""


Body = TypeVar("Body", bound=ModelRequest)


async def answered(
    request: Request,
    state: ServerState,
    body_model: type[Body],
    understand: Callable[[Body, Served, Caller], Reply],
) -> Response:
    """Reads the body, finds its model, and answers for as long as the client is there.

    understand: checks what is asked and makes its reply, in a thread, as it may take long. Raises ApiError.
    """
    state.ready()  # before the body is waited for
    caller = Caller.of(request)
    async with state.bodies.read(request) as data:
        body = await state.in_thread(lambda: parse(body_model, data))
    check_entries(body, state.limits)
    served = await state.served(body.model)
    caller.record.model = served.name
    reply = await state.in_thread(lambda: understand(body, served, caller))
    if body.stream:
        return await unless_disconnected(request.receive, EventStream.begin(reply.stream()))
    return JSONResponse(await unless_disconnected(request.receive, reply.whole()))
