"""The clients of `bench/trust.py` that send garbage: every kind of `trust_bad.py` in turn."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field

from trust_bad import REFUSED, Bad
from trust_client import BUSY, ENGINE_FAILED, at_rate

PATIENCE = 20.0
"""Seconds that an answer is waited for; those that drip end then."""
DRIP = 0.25
MOST_READ = 4096
"""Bytes of an answer that are looked at."""
CONTENT_LENGTH = re.compile(rb"^content-length: *(\d+)", re.M | re.I)


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


async def bad_clients(
    tallies: dict[str, BadTally], address: tuple[str, int], kinds: list[Bad], rate: float, seconds: float, seed: int
) -> None:
    """Every kind in turn, in an order that changes. tallies: by kind, written here."""
    numbers = random.Random(seed)
    order: list[Bad] = []

    async def one(_number: int) -> None:
        if not order:
            order.extend(numbers.sample(kinds, len(kinds)))
        bad = order.pop()
        tally = tallies.setdefault(bad.name, BadTally())
        tally.sent += 1
        begin = time.perf_counter()
        status, said = await send_bad(*address, bad, numbers, min(PATIENCE, seconds))
        tally.seconds.append(time.perf_counter() - begin)
        tally.statuses[str(status)] += 1
        with_engine = status == 500 and ENGINE_FAILED in said  # a grammar that is found too complex on the way
        fine = bad.silent if status is None else status in REFUSED or status in BUSY or with_engine
        if not fine:
            tally.wrong += 1
            tally.said = said

    await at_rate(one, rate, seconds)


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
                rest = await _rest(reader) if line else b""
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
        words = line.split()
        return int(words[1]) if len(words) > 1 and words[1].isdigit() else None, rest.decode(errors="replace")
    except (OSError, TimeoutError, ValueError, asyncio.LimitOverrunError):
        return None, ""
    finally:
        writer.close()


async def _rest(reader: asyncio.StreamReader) -> bytes:
    """What follows an answer's first line, its body as far as it says how long that is."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        length = CONTENT_LENGTH.search(head)
        return head + (await reader.readexactly(min(int(length[1]), MOST_READ)) if length else b"")
    except asyncio.IncompleteReadError as cut:
        return cut.partial
    except OSError:  # the connection was reset behind it
        return b""


async def _send(writer: asyncio.StreamWriter, bad: Bad, numbers: random.Random) -> None:
    for part in bad.parts(numbers):
        writer.write(part)
        await writer.drain()
        if bad.drips:
            await asyncio.sleep(DRIP)
    if bad.cut:
        writer.write_eof()
