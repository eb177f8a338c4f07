"""One API key sends ten times the load of another: the light key's TTFT alone, under --policy fair, and under fcfs.

    python bench/fairness.py [MODEL] [--seconds 30] [--rate 0.7] [--times 10] [--itl-target-ms 50] [--json]

Starts a server on a free port of the loopback interface for each of the three rows, with the same settings but for the
policy. Requests come at random moments (Poisson, the same ones in each row) whether or not earlier ones are answered;
prompts are random token ids, so that none is found in a cache. The rate should be such that both keys together ask for
more than the server can do: then somebody has to wait.
"""

import argparse
import asyncio
import contextlib
import json
import random
import secrets
import time
from dataclasses import dataclass

from asking import ask
from serving import served

from kvarn.bench.serve.client import Target, open_client
from kvarn.bench.serve.ranks import Distribution


@dataclass(frozen=True)
class Load:
    """What one key sends."""

    key: str
    rate: float
    prompt_tokens: int
    output_tokens: int
    seed: int

    def arrivals(self, seconds):
        """(moment, prompt) of each request."""
        rng, now, arrivals = random.Random(self.seed), 0.0, []
        while (now := now + rng.expovariate(self.rate)) < seconds:
            arrivals.append((now, [rng.randrange(1000, 40000) for _ in range(self.prompt_tokens)]))
        return arrivals


def body(prompt, output_tokens):
    return {"prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True, "temperature": 0}


async def run(url, loads, seconds):
    """Sends all loads; the answers of each, in order of arrival, and how long it took."""
    async with contextlib.AsyncExitStack() as stack:
        targets = [Target(url, "completions", api_key=load.key) for load in loads]
        clients = [await stack.enter_async_context(open_client(target)) for target in targets]
        for client in clients:  # the first measured request finds everything awake
            for size in (1, 2, 3):
                several = (ask(client, body([1000 + size] * 50 * size, 4)) for _ in range(size))
                await asyncio.gather(*several)

        async def one(client, load, moment, prompt):
            await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
            return await ask(client, body(prompt, load.output_tokens))

        start = time.perf_counter()
        tasks = [
            [asyncio.create_task(one(client, load, *arrival)) for arrival in load.arrivals(seconds)]
            for load, client in zip(loads, clients, strict=True)
        ]
        answers = [await asyncio.gather(*several) for several in tasks]
        return answers, time.perf_counter() - start


def measure(options, policy, loads):
    """One row of the table."""
    settings = ("--policy", policy, "--itl-target-ms", str(options.itl_target_ms), "--max-num-seqs", "32")
    keys = {"KVARN_API_KEYS": ",".join(load.key for load in loads)}
    with served(options.model, *settings, env=keys) as server:
        answers, seconds = asyncio.run(run(server.url, loads, options.seconds))
    ttfts = [Distribution.of(answer.ttft for answer in several) for several in answers]
    tokens = sum(len(a) * (load.prompt_tokens + load.output_tokens) for a, load in zip(answers, loads, strict=True))
    return {
        "requests": [len(several) for several in answers],
        "light_ttft_p50_s": ttfts[0].p50,
        "light_ttft_p99_s": ttfts[0].p99,
        "heavy_ttft_p50_s": ttfts[1].p50 if len(loads) > 1 else None,
        "tokens_per_s": tokens / seconds,
    }


def report(rows):
    """Prints the table."""
    print(f"{'':12} {'light P50':>10} {'light P99':>10} {'to alone':>9} {'heavy P50':>10} {'tokens/s':>9}  requests")
    alone = rows["light alone"]["light_ttft_p99_s"]
    for name, row in rows.items():
        heavy = "" if row["heavy_ttft_p50_s"] is None else f"{row['heavy_ttft_p50_s'] * 1e3:7.0f} ms"
        print(
            f"{name:12} {row['light_ttft_p50_s'] * 1e3:7.0f} ms {row['light_ttft_p99_s'] * 1e3:7.0f} ms "
            f"{row['light_ttft_p99_s'] / alone:8.2f}× {heavy:>10} {row['tokens_per_s']:9.0f}  "
            f"{' + '.join(map(str, row['requests']))}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--seconds", type=float, default=30, help="for how long requests come, in each row")
    parser.add_argument("--rate", type=float, default=0.7, help="requests of the light key in a second")
    parser.add_argument("--times", type=float, default=10, help="the heavy key's load, in those of the light one")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--itl-target-ms", type=float, default=50)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = (options.prompt_tokens, options.output_tokens)
    light = Load(secrets.token_hex(8), options.rate, *sizes, seed=1)
    heavy = Load(secrets.token_hex(8), options.rate * options.times, *sizes, seed=2)
    rows = {
        "light alone": measure(options, "fair", [light]),
        "both, fair": measure(options, "fair", [light, heavy]),
        "both, fcfs": measure(options, "fcfs", [light, heavy]),
    }
    if options.json:
        print(json.dumps(rows))
    else:
        report(rows)


if __name__ == "__main__":
    main()
