"""May a server be trusted? Twice the load it can take, with everything that clients do wrong, and what came out.

    PYTHONPATH=src python bench/trust.py MODEL [--minutes 20] [--out docs/trust] [--json]

Starts `kvarn serve` on a free port of the loopback interface, measures what it can do with as many requests at a time
as it has places, and sends twice as many of the same requests a second for so many minutes, as a Poisson process that
waits for nobody. Beside it: clients that leave in the middle of a stream, that do not read theirs, that have a key for
less than they ask, that send garbage (trust_bad.py: more than a hundred kinds, at least 10,000 requests in 20 minutes),
and two processes a second that are killed. In the middle a step of the engine is made to fail. In the end the server
gets SIGTERM while it answers. Prints what was tried and what came out; `--out` writes it as NAME.md and NAME.json.
The status is 0 where all of it held. All traffic stays on this machine, and everything ends by itself.

Server and clients share the machine, so clients must cost little and must not time each other. The crowd sends bytes
made beforehand over plain sockets, a connection for each request, and looks at an answer when it has ended
(trust_client.py). It has a process of its own. Another sends the garbage and probes health: what these are timed by has
little else to do. How late the crowd sent its requests is told in the table, as a bound on what it adds to its times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import signal
import sys
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import aiohttp
import trust_bad
from serving import Server, served
from trust_client import ask, closed_loop, outcome
from trust_findings import WARM_UP, Findings, judge, markdown
from trust_garbage import bad_clients
from trust_load import Asking, Crowd, Plan, run_crowd
from trust_watch import Watch, numbers, watch

from kvarn.bench.serve.client import Target, loop_factory
from kvarn.bench.serve.datasets import RandomWords
from kvarn.bench.serve.lengths import Lengths
from kvarn.bench.serve.load import allow_connections
from kvarn.bench.serve.point import open_lane
from kvarn.server.keys.file import add_key

MAX_SEQS, MAX_QUEUED = 16, 32
TIMES_SATURATION = 2.0
DRAINED = 12
"""Requests in flight when SIGTERM comes."""
SATURATION_SECONDS = 30.0
START_SECONDS = 1.0
"""Until the crowd has its plan."""
LEAST_BAD_RATE = 9.0
"""10,800 in 20 minutes."""
IDLE_SECONDS = 60.0
RECOVERY_SECONDS = 5.0
PATIENCE = 120.0
TOO_LATE = ("http 503", "connect", "disconnected")
"""What a request may get that comes after SIGTERM."""


def words(prompt: str, output: str) -> RandomWords:
    """Prompts of random words."""
    return RandomWords(Lengths.parse("prompt", prompt), Lengths.parse("output", output))


async def asking(options, server: Server) -> Asking:
    """What good clients ask of this server."""
    dataset = words("32-128", options.output_tokens)
    async with open_lane(Target(server.url, api_key=options.key), dataset) as lane:
        return Asking(server.host, server.port, options.key, lane.model, lane.scale, dataset)


async def fail_the_engine(findings: Findings, session: aiohttp.ClientSession, server: Server, key: str) -> None:
    """Lets a step fail, and says how long it took until tokens came again."""
    before = await numbers(session, server.url, key)
    server.process.send_signal(signal.SIGUSR1)
    begin = time.perf_counter()
    restarted_with: float | None = None
    while time.perf_counter() - begin < 60:
        now = await numbers(session, server.url, key)
        if restarted_with is None and now["engine_restarts_total"] > before["engine_restarts_total"]:
            restarted_with = now["generation_tokens_total"]
        if restarted_with is not None and now["generation_tokens_total"] > restarted_with:
            seconds = time.perf_counter() - begin
            said = f"tokens came again after {seconds:.2f} s"
            findings.add("the engine fails in the middle", said, seconds < RECOVERY_SECONDS, timed=True)
            return
        await asyncio.sleep(0.02)
    findings.add("the engine fails in the middle", "no token came within 60 s", False)


async def the_load(findings: Findings, good: Asking, server: Server, crowds: Executor, options) -> tuple[Crowd, float]:
    """All clients together. Returns what the crowd met, and the moment from which memory must be flat."""
    seconds = options.minutes * 60
    warmup = min(SATURATION_SECONDS, seconds / 4) / 5
    can_do = await closed_loop(
        good.host, good.port, good.requests("saturation"), MAX_SEQS, seconds=4 * warmup, warmup=warmup
    )
    findings.add("what it can do", f"{can_do:.1f} requests/s, {MAX_SEQS} at a time")
    rate = TIMES_SATURATION * can_do
    begin = time.perf_counter() + START_SECONDS
    plan = Plan(good, replace(good, key=options.limited_key), rate, seconds, begin, options.seed)
    kinds = trust_bad.kinds(options.key)
    bad_rate = max(LEAST_BAD_RATE, 2.5 * len(kinds) / seconds)
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        crowd = asyncio.get_running_loop().run_in_executor(crowds, run_crowd, plan)
        await asyncio.sleep(begin - time.perf_counter())
        group.create_task(bad_clients(findings.bad, (good.host, good.port), kinds, bad_rate, seconds, options.seed))
        await asyncio.sleep(seconds / 2)
        await fail_the_engine(findings, session, server, options.key)
        met = await crowd
    findings.add(
        f"{options.minutes:g} minutes at {rate:.1f} requests/s, {TIMES_SATURATION:g} times that",
        f"{met.good.answered:,} answered ({met.good.tokens:,} tokens), {len(met.good.refused):,} refused, "
        f"{met.good.failed_with_engine} told of the engine's failure",
    )  # fmt: skip
    return met, begin + WARM_UP * seconds


async def drained(findings: Findings, good: Asking, server: Server) -> None:
    """SIGTERM while requests are answered and a client comes too late."""
    requests = replace(good, dataset=words("32", "200")).requests("drain")

    async def one() -> str:
        request = next(requests)
        return outcome(await ask(good.host, good.port, request.data, PATIENCE), request.tokens).failure

    tasks = [asyncio.create_task(one()) for _ in range(DRAINED)]
    await asyncio.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.2)
    late = await one()
    failures = await asyncio.gather(*tasks)
    came = f"{failures.count('')} of {DRAINED} answers came whole {set(failures) - {''} or ''}".strip()
    findings.add("SIGTERM while it answers", came, not any(failures))
    findings.add("a request after SIGTERM", late or "answered", late in TOO_LATE)
    status = await asyncio.to_thread(server.process.wait, 60)
    findings.add("the process ends", f"with status {status}", status == 0)


async def idle_again(findings: Findings, session: aiohttp.ClientSession, server: Server, key: str) -> None:
    """Everything must be given back."""
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        found = await numbers(session, server.url, key)
        left = {name: found[name] for name in gauges if found[name]}
        if not left or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.2)
    findings.add("blocks and requests after the load", "all given back" if not left else f"left: {left}", not left)


async def measure(options, server: Server, crowds: Executor, log: Path) -> Findings:
    """Everything, in order."""
    allow_connections()
    findings, watched = Findings(), Watch()
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        good = await asking(options, server)
        watching = asyncio.create_task(watch(watched, session, server.url, server.process.pid))
        crowd, flat_since = await the_load(findings, good, server, crowds, options)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await idle_again(findings, session, server, options.key)
        await drained(findings, good, server)
    judge(findings, crowd, watched, flat_since, options.minutes * 60, log)
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-cache-bytes", default="256MiB")
    says = "of the good clients' answers; longer for a tiny model"
    parser.add_argument("--output-tokens", default="32-128", help=says)
    parser.add_argument("--out", type=Path, help="where the tables go, as OUT.md and OUT.json")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys, log = Path(folder, "keys.toml"), Path(folder, "server.log")
        options.key = add_key(keys, "good")
        options.limited_key = add_key(keys, "limited", requests_per_minute=10, max_concurrency=2)
        settings = (
            "--keys-file", str(keys), "--max-num-seqs", str(MAX_SEQS), "--max-num-queued-requests", str(MAX_QUEUED),
            "--kv-cache-bytes", options.kv_cache_bytes, "--header-timeout", "5", "--body-timeout", "10",
        )  # fmt: skip
        with (
            served(options.model, *settings, module="kvarn.testing.faulty_server", log=log) as server,
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as crowds,
            asyncio.Runner(loop_factory=loop_factory()) as runner,
        ):
            crowds.submit(int).result()  # it starts now, not under the load
            findings = runner.run(measure(options, server, crowds, log))
    title = f"{Path(options.model).stem}: {options.minutes:g} minutes of everything at once"
    text, result = markdown(findings, title), findings.as_json()
    if options.out:
        options.out.with_suffix(".md").write_text(text)
        options.out.with_suffix(".json").write_text(json.dumps(result))
    print(json.dumps(result) if options.json else text)
    sys.exit(0 if findings.held else 1)


if __name__ == "__main__":
    main()
