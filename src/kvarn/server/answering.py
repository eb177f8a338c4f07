"""The way of a generation request, whichever client's form it has: body, model, prompt, answer, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from kvarn.server.body import check_entries, parse
from kvarn.server.caller import Caller
from kvarn.server.dialects import dialect_of
from kvarn.server.protocol import AnswerRequest, ModelRequest
from kvarn.server.record import RequestRecord
from kvarn.server.sse import EventStream, unless_disconnected
from kvarn.server.state import Served, ServerState


class WholeReply(Protocol):
    """An answer in one client's form."""

    async def whole(self) -> dict[str, Any]:
        """The JSON body, once everything is there. Called once."""


class Reply(WholeReply, Protocol):
    """One that may come as a stream. One of the two is called, once."""

    def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events as they come."""


Body = TypeVar("Body", bound=ModelRequest)
AnswerBody = TypeVar("AnswerBody", bound=AnswerRequest)


async def answered(
    request: Request,
    state: ServerState,
    body_model: type[AnswerBody],
    understand: Callable[[AnswerBody, Served, Caller], Reply],
) -> Response:
    """Reads the body, finds its model, and answers for as long as the client is there.

    understand: checks what is asked and makes its reply, in a thread, as it may take long. Raises ApiError.
    """
    state.ready()  # before the body is waited for
    caller = Caller.of(request)
    body, served = await _received(request, state, body_model)
    reply = await state.in_thread(lambda: understand(body, served, caller))
    if body.stream:
        beginning = EventStream.begin(reply.stream(), dialect_of(request.url.path))
        return await unless_disconnected(request.receive, beginning)
    return JSONResponse(await unless_disconnected(request.receive, reply.whole()))


async def answered_whole(
    request: Request,
    state: ServerState,
    body_model: type[Body],
    understand: Callable[[Body, Served, Caller], WholeReply],
) -> Response:
    """The same for answers that are never streamed."""
    state.ready()
    caller = Caller.of(request)
    body, served = await _received(request, state, body_model)
    reply = await state.in_thread(lambda: understand(body, served, caller))
    return JSONResponse(await unless_disconnected(request.receive, reply.whole()))


async def computed(
    request: Request, state: ServerState, body_model: type[Body], work: Callable[[Body, Served], dict[str, Any]]
) -> Response:
    """Reads the body, finds its model, and answers with what `work` makes of them, in a thread, without the engine."""
    state.ready()
    body, served = await _received(request, state, body_model)
    return JSONResponse(await state.in_thread(lambda: work(body, served)))


async def _received(request: Request, state: ServerState, body_model: type[Body]) -> tuple[Body, Served]:
    async with state.bodies.read(request) as data:
        body = await state.in_thread(lambda: parse(body_model, data))
    check_entries(body, state.limits)
    served = await state.served(body.model, request, body.keep_alive)
    record: RequestRecord = request.state.record
    record.model = served.name
    return body, served
