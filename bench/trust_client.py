"""A client that costs next to nothing: requests are bytes made beforehand, answers are kept as bytes and read at their
end with two patterns. It shares two cores with the server that it is to press, so what it takes the server has not.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

BUSY = (429, 503)
"""What a request may be refused with because others came first."""
ENGINE_FAILED = "error id"
"""What a request is told that an engine took with it."""
CONNECT, TIMEOUT, DISCONNECTED, TRUNCATED = "connect", "timeout", "disconnected", "truncated"
SHOWN = 300
"""Bytes of an answer that are told."""
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_ERROR = re.compile(rb'^(?:event: error|data: \{"error")', re.M)
_DONE = b"data: [DONE]"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request. tokens: of the answer that it asks for; None where the model may end it sooner."""

    data: bytes
    tokens: int | None = None


@dataclass(slots=True)
class Got:
    """What came back. Times are of `time.perf_counter`."""

    sent: float
    end: float = 0.0
    failure: str = ""
    pieces: list[bytes] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the connection's begin to the answer's end."""
        return self.end - self.sent


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request's end. status: 0 where no answer began. failure: "" where the answer came whole."""

    status: int
    tokens: int
    failure: str
    detail: str = ""


class _Exchange(asyncio.Protocol):
    """One connection for one request: what comes is only kept."""

    def __init__(self, data: bytes, got: Got, ended: asyncio.Future[None]) -> None:
        self._data = data
        self._got = got
        self._ended = ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._data)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._got.pieces.append(data)

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self._got.failure = DISCONNECTED
        self._got.end = time.perf_counter()
        if not self._ended.done():
            self._ended.set_result(None)


async def ask(host: str, port: int, data: bytes, patience: float) -> Got:
    """One request over a connection of its own, to its end, whatever that is. patience: seconds."""
    loop = asyncio.get_running_loop()
    got, ended, transport = Got(time.perf_counter()), loop.create_future(), None
    timer = loop.call_later(patience, _give_up, got, ended)
    try:
        transport, _ = await loop.create_connection(lambda: _Exchange(data, got, ended), host, port)
        await ended
    except OSError:
        got.failure = CONNECT
    finally:
        timer.cancel()
        if transport is not None:
            transport.close()
    got.end = got.end or time.perf_counter()
    return got


def _give_up(got: Got, ended: asyncio.Future[None]) -> None:
    got.failure = TIMEOUT
    if not ended.done():
        ended.set_result(None)


def outcome(got: Got, tokens: int | None) -> Outcome:
    """What a streamed answer says. tokens: how many were asked for, `Prepared.tokens`; fewer are a failure."""
    text = b"".join(got.pieces)
    status = _STATUS.match(text)
    if status is None:
        return Outcome(0, 0, got.failure or DISCONNECTED)
    body = text.partition(b"\r\n\r\n")[2]
    code = int(status[1])
    if code != 200:
        return Outcome(code, 0, f"http {code}", _shown(body))
    error = _ERROR.search(body)
    if error is not None:
        return Outcome(code, 0, "error in stream", _shown(body[error.start() :]))
    counts = _TOKENS.findall(body)
    if got.failure or _DONE not in body or not counts:
        return Outcome(code, 0, got.failure or TRUNCATED, _shown(body[-SHOWN:]))
    count = int(counts[-1])
    if tokens not in (None, count):
        return Outcome(code, count, f"{count} of {tokens} tokens")
    return Outcome(code, count, "")


def _shown(text: bytes) -> str:
    return text[:SHOWN].decode(errors="replace")


def post(path: str, body: bytes, key: str) -> bytes:
    """A request as bytes; the connection is closed after it."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def closed_loop(
    host: str, port: int, requests: Iterator[Prepared], at_once: int, seconds: float, warmup: float
) -> float:
    """Answers a second to so many requests at a time, after the warm-up. Raises SystemExit for one that fails."""
    begin = time.perf_counter()
    counted = 0

    async def one() -> None:
        nonlocal counted
        while time.perf_counter() - begin < warmup + seconds:
            request = next(requests)
            got = await ask(host, port, request.data, patience=300)
            came = outcome(got, request.tokens)
            if came.failure:
                raise SystemExit(f"a request failed before any load was sent: {came.failure} {came.detail}")
            counted += warmup <= got.end - begin < warmup + seconds

    await asyncio.gather(*(one() for _ in range(at_once)))
    return counted / seconds


async def at_rate(one: Callable[[int], Awaitable[None]], rate: float, seconds: float) -> None:
    """Calls `one` with 0, 1, 2 … at an even rate, whether or not earlier ones have ended; waits for all."""
    begin = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(int(rate * seconds)):
            await asyncio.sleep(begin + number / rate - time.perf_counter())
            group.create_task(_run(one(number)))


async def _run(work: Awaitable[None]) -> None:
    await work
