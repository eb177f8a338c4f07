"""What continuous batching is worth, over HTTP: against one request at a time, against static batches, by concurrency.

    PYTHONPATH=src python bench/batching.py [MODEL] [--requests 192] [--batch 16] [--sweep 1,2,4,8,16,32,64]
                                            [--plot docs/batching.png] [--json]

Starts `kvarn serve` on a free port of the loopback interface. The same requests, whose answers have a long tail
(lognormal lengths, seeded), run four ways: one after another (a sixth of them), in static batches (the next batch
begins when the longest answer of the last one has ended; computed to that end for all of the batch, as batches of one
shape are, or freed of those that have ended), and continuously (as many at once, a new one whenever one ends). Then a
closed loop of so many clients for each concurrency of the sweep. Every pass has a `cache_salt` of its own, so none
finds what another has computed. Needs kvarn[bench], `--plot` kvarn[plots]. The highest load that keeps an SLO is found
by `kvarn bench serve --sweep`.
"""

import argparse
import asyncio
import contextlib
import json
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from asking import ask
from serving import served

from kvarn import figures
from kvarn.bench.serve.client import Target, open_client
from kvarn.bench.serve.ranks import Distribution
from kvarn.bench.serve.words import COMMON

KV_CACHE_BYTES = "2GiB"
"""More than all clients use at once; less than the passes together, so that blocks are evicted as in daily work."""
MEDIAN_TOKENS, SPREAD, MOST_TOKENS = 16, 1.8, 1024
"""Of the answers' lengths, lognormal: a mean of about 64 tokens, a few answers of many hundreds."""


@dataclass(frozen=True)
class Work:
    """A request to make."""

    prompt: str
    tokens: int


@dataclass(frozen=True)
class Pass:
    """What came of one way to run the requests. Times in seconds."""

    name: str
    requests: int
    seconds: float
    tokens: int
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float

    @property
    def rate(self) -> float:
        """Tokens/s of all requests together."""
        return self.tokens / self.seconds


def long_tailed(count: int, seed: int) -> list[Work]:
    """Requests with few long answers among many short ones."""
    rng = random.Random(seed)
    works = []
    for number in range(count):
        prompt = " ".join([f"({number})", *rng.choices(COMMON, k=rng.randint(5, 20))])
        works.append(Work(prompt, min(MOST_TOKENS, max(4, round(rng.lognormvariate(0, SPREAD) * MEDIAN_TOKENS)))))
    return works


def alike(count: int, seed: int) -> list[Work]:
    """Requests of one size, for the sweep."""
    rng = random.Random(seed)
    return [Work(" ".join([f"({n})", *rng.choices(COMMON, k=20)]), 256) for n in range(count)]


def body(work, salt):
    """A request that finds nothing of another pass."""
    return {"messages": [{"role": "user", "content": work.prompt}], "max_tokens": work.tokens, "ignore_eos": True,
            "temperature": 0, "cache_salt": salt}  # fmt: skip


def to_the_longest(batch: list[Work]) -> list[Work]:
    """All with the longest answer among them."""
    return [replace(work, tokens=max(other.tokens for other in batch)) for work in batch]


async def run(client, name, works, at_once, static=False, one_shape=False) -> Pass:
    """All works, `at_once` of them at a time; static: batch by batch; one_shape: as long as the longest of each batch.

    Tokens that nobody asked for are not counted.
    """
    free = asyncio.Semaphore(at_once)

    async def one(work):
        async with contextlib.nullcontext() if static else free:
            return await ask(client, body(work, name))

    started = time.perf_counter()
    answers = []
    for begin in range(0, len(works), at_once if static else len(works)):
        batch = works[begin : begin + at_once] if static else works
        answers += await asyncio.gather(*(one(work) for work in (to_the_longest(batch) if one_shape else batch)))
    seconds = time.perf_counter() - started
    ttft = Distribution.of(answer.ttft for answer in answers)
    itl = Distribution.of(gap for answer in answers for gap in answer.gaps)
    tokens = sum(work.tokens for work in works)
    return Pass(name, len(works), seconds, tokens, ttft.p50, ttft.p99, itl.p50, itl.p99)


async def measure(url, requests, batch, sweep):
    """(the four ways, the sweep)."""
    works = long_tailed(requests, seed=1)
    async with open_client(Target(url)) as client:
        await run(client, "first", works[:1], 1)
        ways = [
            await run(client, "one at a time", works[:: max(1, requests // 16)], 1),
            await run(client, f"static, {batch} of one shape", works, batch, static=True, one_shape=True),
            await run(client, f"static batches of {batch}", works, batch, static=True),
            await run(client, f"continuous, {batch} at once", works, batch),
        ]
        clients = [
            await run(client, f"{count} clients", alike(max(12, 3 * count), seed=count), count) for count in sweep
        ]
    return ways, clients


def table(passes, baseline):
    """One line a pass; ratios to the baseline's tokens/s."""
    print(f"{'':26}{'requests':>9}{'tokens/s':>10}{'':>8}{'TTFT p50':>11}{'p99':>9}{'ITL p50':>10}{'p99':>9}")
    for p in passes:
        first = f"{p.ttft_p50 * 1e3:8.0f} ms{p.ttft_p99 * 1e3:6.0f} ms"
        gap = f"{p.itl_p50 * 1e3:7.1f} ms{p.itl_p99 * 1e3:6.1f} ms"
        print(f"{p.name:26}{p.requests:9}{p.rate:10.1f}{p.rate / baseline.rate:7.2f}×{first}{gap}")
    print()


def plot(path: Path, model: str, sweep, passes) -> None:
    """Throughput and TTFT by concurrency."""
    figure, (left, right) = figures.pyplot().subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(sweep, [p.rate for p in passes], "o-", color="#2a6f97")
    left.set_ylabel("tokens/s, all clients together")
    left.set_ylim(0)
    for name, color, values in (
        ("P50", "#7a9e3c", [p.ttft_p50 * 1e3 for p in passes]),
        ("P99", "#c8553d", [p.ttft_p99 * 1e3 for p in passes]),
    ):
        right.plot(sweep, values, "o-", color=color, label=name)
    right.set_ylabel("time to first token, ms")
    right.set_yscale("log")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sweep, [str(count) for count in sweep])
        axes.set_xlabel("clients, each with one request at a time")
    figure.suptitle(f"{model}: prompts of about 50 tokens, answers of 256, no prefix hits")
    figures.save(figure, path)


def numbers(text: str) -> list[int]:
    """Numbers with commas between them."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sweep", type=numbers, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.plot:
        figures.check(options.plot)
    with served(options.model, "--kv-cache-bytes", KV_CACHE_BYTES) as server:
        ways, clients = asyncio.run(measure(server.url, options.requests, options.batch, options.sweep))
    if options.json:
        print(json.dumps({"ways": [asdict(p) for p in ways], "clients": [asdict(p) for p in clients]}))
    else:
        table(ways, ways[0])
        ratios = [f"{ways[3].rate / way.rate:.2f}×" for way in ways[1:3]]
        print(f"continuous against static: {ratios[0]} of one shape, {ratios[1]} where what has ended is freed\n")
        table(clients, clients[0])
    if options.plot:
        plot(options.plot, Path(options.model).stem, options.sweep, clients)


if __name__ == "__main__":
    main()
