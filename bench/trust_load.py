"""The crowd of `bench/trust.py`: clients that are good, vanish, stall, ask for more than they may, or are killed.

They run in a process of their own, so that they delay no other client's clock. `run_crowd` is what it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from trust_client import BUSY, ENGINE_FAILED, Outcome, Prepared, ask, at_rate, outcome, post

from kvarn.bench.serve.arrivals import Arrivals
from kvarn.bench.serve.client import Target, loop_factory
from kvarn.bench.serve.datasets import RandomWords
from kvarn.bench.serve.load import allow_connections
from kvarn.bench.serve.tokens import TokenScale

CHAT = "/v1/chat/completions"
LEAVING, STALLING, LIMITED, KILLED = 1.0, 0.3, 2.0, 2.0
"""Requests a second of each."""
GRAMMAR_EVERY = 6
"""One in so many good requests has a grammar."""
PATIENCE = 300.0
"""Seconds that a good client waits for its answer."""
STALL = 15.0
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

    def add(self, came: Outcome, seconds: float) -> None:
        """Takes one."""
        if not came.failure:
            self.answered += 1
            self.tokens += came.tokens
        elif came.status in BUSY:
            self.refused.append(seconds)
        elif came.status in (200, 500) and ENGINE_FAILED in came.detail:
            self.failed_with_engine += 1
        else:
            self.lost[f"{came.failure}: {came.detail[:80]}"] += 1


@dataclass(frozen=True)
class Asking:
    """Whom the good clients ask, and what: enough to make their requests in any process."""

    host: str
    port: int
    key: str
    model: str
    scale: TokenScale
    dataset: RandomWords

    def requests(self, seed: str) -> Iterator[Prepared]:
        """Without end, the same for the same seed."""
        target = Target(f"http://{self.host}:{self.port}")
        for number, prompt in enumerate(self.dataset.prompts(seed, self.scale)):
            body, tokens = target.body(prompt, self.model), prompt.output_tokens
            if number % GRAMMAR_EVERY == GRAMMAR_EVERY - 1:
                fields = json.loads(body)
                del fields["ignore_eos"]
                fields["structured_outputs"] = {"choice": ["yes", "no", "it depends"]}
                yield Prepared(post(CHAT, json.dumps(fields).encode(), self.key))
            else:
                yield Prepared(post(CHAT, body, self.key), tokens)

    def stream_of(self, tokens: int, words: str) -> bytes:
        """A request whose answer streams, for who does not read it to its end."""
        body = {"messages": [{"role": "user", "content": f"Tell me {words}."}], "max_tokens": tokens, "stream": True,
                "ignore_eos": True}  # fmt: skip
        return post(CHAT, json.dumps(body).encode(), self.key)


@dataclass(frozen=True)
class Plan:
    """What the crowd is to do. rate: good requests a second. begin: the moment, of `time.perf_counter`, which all
    processes of a machine share."""

    good: Asking
    limited: Asking
    rate: float
    seconds: float
    begin: float
    seed: int


@dataclass
class Crowd:
    """What came of it."""

    good: Tally = field(default_factory=Tally)
    limited: Tally = field(default_factory=Tally)
    late: list[float] = field(default_factory=list)
    """Seconds by which good requests were sent too late: what the process itself adds to each of its times."""
    left: int = 0
    stalled: int = 0
    killed: int = 0
    cpu: float = 0.0
    """Seconds of processor time, without those of the processes that are killed."""


def run_crowd(plan: Plan) -> Crowd:
    """All of them, to their ends."""
    allow_connections()
    crowd, cpu = Crowd(), time.process_time()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_all(plan, crowd))
    crowd.cpu = time.process_time() - cpu
    return crowd


async def _all(plan: Plan, crowd: Crowd) -> None:
    await asyncio.sleep(plan.begin - time.perf_counter())
    async with asyncio.TaskGroup() as group:
        group.create_task(_open_loop(plan.good, plan.rate, plan, crowd.good, crowd.late))
        group.create_task(_open_loop(plan.limited, LIMITED, plan, crowd.limited, []))
        group.create_task(_clients_that_leave(plan, crowd))
        group.create_task(_clients_that_stall(plan, crowd))
        group.create_task(_clients_that_are_killed(plan, crowd))


async def _open_loop(asking: Asking, rate: float, plan: Plan, tally: Tally, late: list[float]) -> None:
    """Each answer is read as it ends, so that twenty minutes need no memory."""

    async def one(request: Prepared, planned: float) -> None:
        late.append(time.perf_counter() - planned)
        got = await ask(asking.host, asking.port, request.data, PATIENCE)
        tally.add(outcome(got, request.tokens), got.seconds)

    seed = f"{asking.key} {plan.seed}"
    requests = asking.requests(seed)
    async with asyncio.TaskGroup() as group:
        for moment in Arrivals().times(rate, seed):
            if moment > plan.seconds:
                return
            request, planned = next(requests), plan.begin + moment
            await asyncio.sleep(planned - time.perf_counter())
            group.create_task(one(request, planned))


async def _clients_that_leave(plan: Plan, crowd: Crowd) -> None:
    """Each closes its connection in the middle of its stream, every other one by a reset."""

    async def one(number: int) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection(plan.good.host, plan.good.port)
            writer.write(plan.good.stream_of(100 + number % 100, f"story {number}"))
            async with asyncio.timeout(STALL):
                for _ in range(number % 5 + 1):
                    await reader.read(300)
            _end(writer, reset=bool(number % 2))
        crowd.left += 1

    await at_rate(one, LEAVING, plan.seconds)


async def _clients_that_stall(plan: Plan, crowd: Crowd) -> None:
    """Each asks for a long stream and reads nothing of it, with as small a buffer as the system gives."""

    async def one(number: int) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.closing(socket.socket()) as silent, contextlib.suppress(OSError):
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            silent.setblocking(False)
            await loop.sock_connect(silent, (plan.good.host, plan.good.port))
            await loop.sock_sendall(silent, plan.good.stream_of(300, f"long story {number}"))
            await asyncio.sleep(min(STALL, plan.seconds))
        crowd.stalled += 1

    await at_rate(one, STALLING, plan.seconds)


async def _clients_that_are_killed(plan: Plan, crowd: Crowd) -> None:
    """Processes that read a stream until they get SIGKILL."""

    async def one(number: int) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-c", VICTIM, plan.good.host, str(plan.good.port),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(plan.good.stream_of(200, f"tale {number}"))
            process.stdin.close()
            await process.stdout.readline()
            await asyncio.sleep(0.3 + number % 7 / 10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        crowd.killed += 1

    await at_rate(one, KILLED, plan.seconds)


def _end(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    if reset:
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
