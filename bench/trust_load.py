"""The clients of `bench/trust.py`: good ones, those that vanish, stall, ask too much, send garbage, or are killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from trust_bad import REFUSED, Bad

from kvarn.bench.serve.answers import Answer, read_answer
from kvarn.bench.serve.arrivals import Arrivals
from kvarn.bench.serve.client import Client
from kvarn.bench.serve.point import Lane

PATIENCE = 20.0
"""Seconds that a bad request's answer is waited for; those that drip end then."""
DRIP = 0.25
STALL = 15.0
MOST_READ = 4096
"""Bytes of an answer to a bad request that are looked at."""
BUSY = (429, 503)
ENGINE_FAILED = "error id"
"""What a request is told that an engine took with it."""
VICTIM = """
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
s.sendall(sys.stdin.buffer.read())
print("sent", flush=True)
while s.recv(4096): pass
"""


@dataclass
class Tally:
    """What became of good requests. Refused: by seconds until the refusal was there."""

    answered: int = 0
    tokens: int = 0
    refused: list[float] = field(default_factory=list)
    failed_with_engine: int = 0
    """Told so, with an id."""
    lost: Counter[str] = field(default_factory=Counter)
    """Neither answered whole nor told why: by kind."""

    def add(self, answer: Answer) -> None:
        """Takes one."""
        if not answer.failure:
            self.answered += 1
            self.tokens += answer.output_tokens
        elif answer.failure in {f"http {status}" for status in BUSY}:
            self.refused.append(answer.e2e)
        elif answer.failure in ("error in stream", "http 500") and ENGINE_FAILED in answer.detail:
            self.failed_with_engine += 1
        else:
            self.lost[f"{answer.failure}: {answer.detail[:80]}"] += 1


@dataclass
class BadTally:
    """What became of bad requests of one kind."""

    sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    """Until an answer or the end of the connection."""
    wrong: int = 0
    """Answered as if they were good, with a 5xx, or not at all where an answer was due."""
    said: str = ""
    """What the last of those was answered."""


@dataclass
class Stage:
    """Where the clients play. Owns what they count."""

    host: str
    port: int
    key: str
    seed: int
    good: Tally = field(default_factory=Tally)
    limited: Tally = field(default_factory=Tally)
    bad: dict[str, BadTally] = field(default_factory=dict)
    left: int = 0
    stalled: int = 0
    killed: int = 0

    def stream_of(self, tokens: int, words: str = "a story") -> bytes:
        """A request whose answer streams."""
        body = {"messages": [{"role": "user", "content": f"Tell me {words}."}], "max_tokens": tokens, "stream": True,
                "ignore_eos": True}  # fmt: skip
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data


async def good_clients(stage: Stage, lane: Lane, bodies: Iterator[bytes], rate: float, seconds: float) -> None:
    """An open loop; each answer is read as it ends, so that twenty minutes need no memory."""
    await _open_loop(lane.client, bodies, rate, seconds, f"good {stage.seed}", stage.good)


async def clients_over_limits(
    stage: Stage, client: Client, bodies: Iterator[bytes], rate: float, seconds: float
) -> None:
    """The same with a key that allows less."""
    await _open_loop(client, bodies, rate, seconds, f"limited {stage.seed}", stage.limited)


async def _open_loop(
    client: Client, bodies: Iterator[bytes], rate: float, seconds: float, seed: str, tally: Tally
) -> None:
    async def one(body: bytes) -> None:
        tally.add(read_answer(await client.ask(body)))

    begin = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for moment in Arrivals().times(rate, seed):
            if moment > seconds:
                return
            await asyncio.sleep(begin + moment - time.perf_counter())
            group.create_task(one(next(bodies)))


async def clients_that_leave(stage: Stage, rate: float, seconds: float) -> None:
    """Each closes its connection in the middle of its stream, every other one by a reset."""

    async def one(number: int) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection(stage.host, stage.port)
            writer.write(stage.stream_of(100 + number % 100, f"story {number}"))
            async with asyncio.timeout(PATIENCE):
                for _ in range(number % 5 + 1):
                    await reader.read(300)
            _end(writer, reset=bool(number % 2))
        stage.left += 1

    await _at_rate(one, rate, seconds)


async def clients_that_stall(stage: Stage, rate: float, seconds: float) -> None:
    """Each asks for a long stream and reads nothing of it, with as small a buffer as the system gives."""

    async def one(number: int) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.closing(socket.socket()) as silent, contextlib.suppress(OSError):
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            silent.setblocking(False)
            await loop.sock_connect(silent, (stage.host, stage.port))
            await loop.sock_sendall(silent, stage.stream_of(300, f"long story {number}"))
            await asyncio.sleep(min(STALL, seconds))
        stage.stalled += 1

    await _at_rate(one, rate, seconds)


async def clients_that_are_killed(stage: Stage, rate: float, seconds: float) -> None:
    """Processes that read a stream until they get SIGKILL."""

    async def one(number: int) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-c", VICTIM, stage.host, str(stage.port),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(stage.stream_of(200, f"tale {number}"))
            process.stdin.close()
            await process.stdout.readline()
            await asyncio.sleep(0.3 + number % 7 / 10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        stage.killed += 1

    await _at_rate(one, rate, seconds)


async def bad_clients(stage: Stage, kinds: list[Bad], rate: float, seconds: float) -> None:
    """Every kind in turn, in an order that changes."""
    numbers = random.Random(stage.seed)
    order: list[Bad] = []

    async def one(_number: int) -> None:
        if not order:
            order.extend(numbers.sample(kinds, len(kinds)))
        bad = order.pop()
        tally = stage.bad.setdefault(bad.name, BadTally())
        tally.sent += 1
        begin = time.perf_counter()
        status, said = await send_bad(stage.host, stage.port, bad, numbers, min(PATIENCE, seconds))
        tally.seconds.append(time.perf_counter() - begin)
        tally.statuses[str(status)] += 1
        with_engine = status == 500 and ENGINE_FAILED in said  # a grammar that is found too complex on the way
        fine = bad.silent if status is None else status in REFUSED or status in BUSY or with_engine
        if not fine:
            tally.wrong += 1
            tally.said = said

    await _at_rate(one, rate, seconds)


async def send_bad(
    host: str, port: int, bad: Bad, numbers: random.Random, patience: float
) -> tuple[int | None, str]:
    """The status of the answer and what follows its first line; None where the connection ended without one, or after
    `patience` seconds."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return None, ""
    try:
        async with asyncio.timeout(patience):
            sending = asyncio.create_task(_send(writer, bad, numbers))
            try:
                line = await reader.readline()
                rest = await reader.read(MOST_READ) if line else b""
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
        words = line.split()
        return int(words[1]) if len(words) > 1 and words[1].isdigit() else None, rest.decode(errors="replace")
    except (OSError, TimeoutError, ValueError):
        return None, ""
    finally:
        writer.close()


async def _send(writer: asyncio.StreamWriter, bad: Bad, numbers: random.Random) -> None:
    for part in bad.parts(numbers):
        writer.write(part)
        await writer.drain()
        if bad.drips:
            await asyncio.sleep(DRIP)
    if bad.cut:
        writer.write_eof()


async def _at_rate(one: Callable[[int], Awaitable[None]], rate: float, seconds: float) -> None:
    """Calls `one` with 0, 1, 2 … at an even rate, whether or not earlier ones have ended; waits for all."""
    begin = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(int(rate * seconds)):
            await asyncio.sleep(begin + number / rate - time.perf_counter())
            group.create_task(_run(one(number)))


async def _run(work: Awaitable[None]) -> None:
    await work


def _end(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    if reset:
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
