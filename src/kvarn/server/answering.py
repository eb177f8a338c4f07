"""The way of a generation request, whichever client's form it has: body, model, prompt, answer, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from kvarn.server.body import check_entries, parse
from kvarn.server.caller import Caller
from kvarn.server.dialects import dialect_of
from kvarn.server.keys.account import Visit
from kvarn.server.limits import ServerLimits
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
R = TypeVar("R", bound=WholeReply)
AnswerBody = TypeVar("AnswerBody", bound=AnswerRequest)
SHORT_BODY = 8 << 10
"""Bytes up to which a body is read in the event loop: handing it to a thread and back would take longer."""


class _Received(NamedTuple, Generic[Body]):
    """size: bytes of the body."""

    body: Body
    served: Served
    size: int


async def answered(
    request: Request,
    state: ServerState,
    body_model: type[AnswerBody],
    understand: Callable[[AnswerBody, Served, Caller], Reply],
) -> Response:
    """Reads the body, finds its model, and answers for as long as the client is there.

    understand: checks what is asked and makes its reply, in a thread, as it may take long. Raises ApiError.
    """
    body, reply = await _understood(request, state, body_model, understand)
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
    _, reply = await _understood(request, state, body_model, understand)
    return JSONResponse(await unless_disconnected(request.receive, reply.whole()))


async def _understood(
    request: Request, state: ServerState, body_model: type[Body], understand: Callable[[Body, Served, Caller], R]
) -> tuple[Body, R]:
    """The body, and the reply that will be made. Who cannot get in is refused before the work is done."""
    state.ready()
    state.check_room()
    caller = Caller.of(request)
    body, served, size = await _received(request, state, body_model)
    served.llm.check_room()
    return body, await state.in_thread(lambda: understand(body, served, caller), size)


async def computed(
    request: Request, state: ServerState, body_model: type[Body], work: Callable[[Body, Served], dict[str, Any]]
) -> Response:
    """Reads the body, finds its model, and answers with what `work` makes of them, in a thread, without the engine."""
    state.ready()
    body, served, size = await _received(request, state, body_model)
    return JSONResponse(await state.in_thread(lambda: work(body, served), size))


def _read(body_model: type[Body], data: bytes, limits: ServerLimits) -> Body:
    body = parse(body_model, data)
    check_entries(body, limits)
    return body


async def _received(request: Request, state: ServerState, body_model: type[Body]) -> _Received[Body]:
    async with state.bodies.read(request) as data:
        size = len(data)
        if size <= SHORT_BODY:
            body = _read(body_model, data, state.limits)
        else:
            body = await state.in_thread(lambda: _read(body_model, data, state.limits), size)
    if body.keep_alive is not None:
        visit: Visit = request.state.visit
        visit.account.check_keep_alive()
    served = await state.served(body.model, request, body.keep_alive)
    record: RequestRecord = request.state.record
    record.model = served.name
    return _Received(body, served, size)
