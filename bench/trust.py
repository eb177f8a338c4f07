"""May a server be trusted? Twice the load it can take, with everything that clients do wrong, and what came out.

    PYTHONPATH=src python bench/trust.py MODEL [--minutes 20] [--out docs/trust] [--json]

Starts `kvarn serve` on a free port of the loopback interface, measures what it can do, and sends twice as much for so
many minutes. Beside it: clients that leave in the middle of a stream, that do not read theirs, that have a key for less
than they ask, that send garbage (trust_bad.py: more than a hundred kinds, at least 10,000 requests in 20 minutes), and
two processes a second that are killed. In the middle a step of the engine is made to fail. In the end the server gets
SIGTERM while it answers. Prints what was tried and what came out; `--out` writes it as NAME.md and NAME.json.
The status is 0 where all of it held. All traffic stays on this machine, and everything ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp
import trust_bad
from serving import Server, served
from trust_load import (
    BadTally,
    Stage,
    Tally,
    bad_clients,
    clients_over_limits,
    clients_that_are_killed,
    clients_that_leave,
    clients_that_stall,
    good_clients,
)  # fmt: skip
from trust_watch import Watch, numbers, tracebacks, watch

from kvarn.bench.serve.answers import read_answer
from kvarn.bench.serve.client import Target, loop_factory, open_client
from kvarn.bench.serve.datasets import RandomWords
from kvarn.bench.serve.lengths import Lengths
from kvarn.bench.serve.load import Extent, allow_connections
from kvarn.bench.serve.offer import AtOnce
from kvarn.bench.serve.point import Bench, Lane, open_lane
from kvarn.bench.serve.ranks import Distribution
from kvarn.bench.serve.slo import Slo
from kvarn.server.keys.file import add_key

MAX_SEQS, MAX_QUEUED = 16, 32
DRAINED = 12
"""Requests in flight when SIGTERM comes."""
SATURATION_SECONDS = 10.0
MOST_RATE = 60.0
"""Requests a second: beyond it this process, not the server, would be what is measured."""
LEAVING, STALLING, LIMITED, KILLED = 1.0, 0.3, 2.0, 2.0
"""Requests a second of each."""
LEAST_BAD_RATE = 9.0
"""10,800 in 20 minutes."""
WARM_UP = 0.25
"""Share of the time after which memory must be flat."""
LEAST_JUDGED = 120.0
"""Seconds of load below which a slope of memory says nothing."""
FLAT = 0.02
"""Share of its memory that the server may grow by after the warm-up."""
IDLE_SECONDS = 60.0
RECOVERY_SECONDS = 5.0
REFUSED_SECONDS, LIVE_SECONDS = 0.050, 0.100
TOO_LATE = ("http 503", "connect", "disconnected")
"""What a request may get that comes after SIGTERM."""
INJECTED = "a step fails because a test wants it"


@dataclass
class Outcome:
    """A row of the table. held: None where it is told but not judged."""

    tried: str
    came_out: str
    held: bool | None
    timed: bool = False
    """Whether that was decided by a time, which other work on the machine can spoil."""


@dataclass
class Findings:
    """All rows, and what the server could do."""

    rows: list[Outcome] = field(default_factory=list)
    bad: dict[str, BadTally] = field(default_factory=dict)

    def add(self, tried: str, came_out: str, held: bool | None = None, *, timed: bool = False) -> None:
        """One more row."""
        self.rows.append(Outcome(tried, came_out, held, timed))

    def as_json(self) -> dict[str, object]:
        """The same for --json."""
        bad = {name: {**vars(tally), "statuses": dict(tally.statuses)} for name, tally in self.bad.items()}
        return {"held": self.held, "rows": [asdict(row) for row in self.rows], "bad": bad}

    @property
    def held(self) -> bool:
        """Whether all of them did."""
        return all(row.held is not False for row in self.rows)


def words(prompt: str, output: str) -> RandomWords:
    """Prompts of random words."""
    return RandomWords(Lengths.parse("prompt", prompt), Lengths.parse("output", output))


def bodies(lane: Lane, seed: str, dataset: RandomWords) -> Iterator[bytes]:
    """Requests of the good clients: every sixth with a grammar."""
    for number, prompt in enumerate(dataset.prompts(seed, lane.scale)):
        body = json.loads(lane.client.target.body(prompt, lane.model))
        if number % 6 == 5:
            del body["ignore_eos"]
            body["structured_outputs"] = {"choice": ["yes", "no", "it depends"]}
        yield json.dumps(body).encode()


async def saturation(lane: Lane, dataset: RandomWords, seconds: float) -> float:
    """Requests a second that the server answers when all its places are taken."""
    bench = Bench(dataset, Extent(seconds=seconds, warmup=seconds / 5), Slo())
    return (await lane.measure(bench, AtOnce(MAX_SEQS), "saturation")).summary.requests_per_s


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


async def the_load(findings: Findings, stage: Stage, lane: Lane, server: Server, options) -> float:
    """All clients together. Returns the moment from which memory must be flat."""
    seconds, dataset = options.minutes * 60, words("32-128", options.output_tokens)
    can_do = await saturation(lane, dataset, min(SATURATION_SECONDS, seconds / 4))
    rate = min(2 * can_do, MOST_RATE)
    bad_rate = max(LEAST_BAD_RATE, 2.5 * len(trust_bad.kinds("")) / seconds)
    findings.add("what it can do", f"{can_do:.1f} requests/s, {MAX_SEQS} at a time")
    limited = Target(server.url, api_key=options.limited_key, timeout=120)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(open_client(limited))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        begin = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            group.create_task(good_clients(stage, lane, bodies(lane, "good", dataset), rate, seconds))
            group.create_task(clients_over_limits(stage, client, bodies(lane, "limited", dataset), LIMITED, seconds))
            group.create_task(clients_that_leave(stage, LEAVING, seconds))
            group.create_task(clients_that_stall(stage, STALLING, seconds))
            group.create_task(clients_that_are_killed(stage, KILLED, seconds))
            group.create_task(bad_clients(stage, trust_bad.kinds(options.key), bad_rate, seconds))
            await asyncio.sleep(seconds / 2)
            await fail_the_engine(findings, session, server, options.key)
    findings.add(
        f"{options.minutes:g} minutes at {rate:.1f} requests/s, {rate / can_do:.1f} times that",
        f"{stage.good.answered:,} answered ({stage.good.tokens:,} tokens), {len(stage.good.refused):,} refused, "
        f"{stage.good.failed_with_engine} told of the engine's failure",
    )  # fmt: skip
    return begin + WARM_UP * seconds


async def drained(findings: Findings, lane: Lane, server: Server) -> None:
    """SIGTERM while requests are answered and a client comes too late."""
    dataset = words("32", "200")
    asked = bodies(lane, "drain", dataset)
    tasks = [asyncio.create_task(lane.client.ask(next(asked))) for _ in range(DRAINED)]
    await asyncio.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.2)
    late = read_answer(await lane.client.ask(next(asked)))
    answers = [read_answer(reply) for reply in await asyncio.gather(*tasks)]
    whole = sum(not answer.failure for answer in answers)
    said = {answer.failure for answer in answers if answer.failure}
    came = f"{whole} of {DRAINED} answers came whole {said or ''}".strip()
    findings.add("SIGTERM while it answers", came, whole == DRAINED)
    findings.add("a request after SIGTERM", late.failure or "answered", late.failure in TOO_LATE)
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


def judge(findings: Findings, stage: Stage, watched: Watch, flat_since: float, seconds: float, log: Path) -> None:
    """The rows about the load as a whole."""
    lost = stage.good.lost + stage.limited.lost
    findings.add("accepted requests lost", f"{lost.total()} {dict(lost.most_common(5)) or ''}".strip(), not lost)
    refused = Distribution.of([*stage.good.refused, *stage.limited.refused])
    if refused is not None:
        said = f"{refused.count:,}: P50 {1e3 * refused.p50:.1f} ms, P99 {1e3 * refused.p99:.1f} ms"
        findings.add("time to be refused (429, 503)", said, refused.p99 < REFUSED_SECONDS, timed=True)
    _judge_limits(findings, stage.limited)
    _judge_bad(findings, stage)
    findings.add("clients that left, stalled, were killed", f"{stage.left}, {stage.stalled}, {stage.killed}")
    live = Distribution.of(watched.live_seconds)
    assert live is not None
    said = f"{live.count:,} probes: P99 {1e3 * live.p99:.1f} ms, most {1e3 * live.most:.0f} ms"
    findings.add("/health/live under it", said, live.p99 < LIVE_SECONDS, timed=True)
    findings.add("probes of it that failed", str(watched.live_failures), not watched.live_failures)
    slope, middle = watched.growth(flat_since)
    grown = slope * (1 - WARM_UP) * seconds / 60
    said = f"{slope:+.2f} MiB a minute of {middle:,.0f}, {watched.most_open_files} open files at most"
    findings.add("memory after the warm-up", said, grown < FLAT * middle if seconds >= LEAST_JUDGED else None)
    raised = [line for line in tracebacks(log) if INJECTED not in line]
    findings.add("tracebacks in the log", f"{len(raised)} {raised[:3] or ''}".strip(), not raised)


def _judge_limits(findings: Findings, limited: Tally) -> None:
    said = f"{limited.answered} answered, {len(limited.refused)} refused"
    findings.add("a key over its limits", said, len(limited.refused) > 0 and limited.answered > 0)


def _judge_bad(findings: Findings, stage: Stage) -> None:
    findings.bad = stage.bad
    prompt = {bad.name for bad in trust_bad.kinds("") if bad.prompt}
    sent = sum(tally.sent for tally in stage.bad.values())
    wrong = {name: (dict(tally.statuses), tally.said[-300:]) for name, tally in stage.bad.items() if tally.wrong}
    findings.add(f"{sent:,} bad requests of {len(stage.bad)} kinds", f"not refused: {wrong or 'none'}", not wrong)
    times = Distribution.of(second for name in prompt & stage.bad.keys() for second in stage.bad[name].seconds)
    if times is not None:
        said = f"P50 {1e3 * times.p50:.1f} ms, P99 {1e3 * times.p99:.1f} ms"
        findings.add("time until a bad request is refused", said, times.p99 < REFUSED_SECONDS, timed=True)


async def measure(options, server: Server, log: Path) -> Findings:
    """Everything, in order."""
    allow_connections()
    findings, watched = Findings(), Watch()
    stage = Stage(server.host, server.port, options.key, options.seed)
    target = Target(server.url, api_key=options.key, timeout=300)
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        lane = await stack.enter_async_context(open_lane(target, words("32", "8")))
        watching = asyncio.create_task(watch(watched, session, server.url, server.process.pid))
        flat_since = await the_load(findings, stage, lane, server, options)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await idle_again(findings, session, server, options.key)
        await drained(findings, lane, server)
    judge(findings, stage, watched, flat_since, options.minutes * 60, log)
    return findings


def markdown(findings: Findings, title: str) -> str:
    """Two tables: what was tried, and every kind of bad request."""
    marks = {True: "held", False: "**did not hold**", None: ""}
    lines = [f"# {title}", "", "| what was tried | what came out | |", "|---|---|---|"]
    lines += [f"| {row.tried} | {row.came_out.replace('|', '/')} | {marks[row.held]} |" for row in findings.rows]
    lines += ["", "| bad request | sent | answers | P99 ms |", "|---|---|---|---|"]
    for name, tally in sorted(findings.bad.items()):
        counts = tally.statuses.most_common()
        answers = ", ".join(f"{'closed' if status == 'None' else status}: {count}" for status, count in counts)
        times = Distribution.of(tally.seconds)
        lines.append(f"| {name} | {tally.sent} | {answers} | {'' if times is None else f'{1e3 * times.p99:.1f}'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-cache-bytes", default="256MiB")
    parser.add_argument("--output-tokens", default="8-48", help="of the good clients' answers; longer for a tiny model")
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
            asyncio.Runner(loop_factory=loop_factory()) as runner,
        ):
            findings = runner.run(measure(options, server, log))
    title = f"{Path(options.model).stem}: {options.minutes:g} minutes of everything at once"
    text, result = markdown(findings, title), findings.as_json()
    if options.out:
        options.out.with_suffix(".md").write_text(text)
        options.out.with_suffix(".json").write_text(json.dumps(result))
    print(json.dumps(result) if options.json else text)
    sys.exit(0 if findings.held else 1)


if __name__ == "__main__":
    main()
