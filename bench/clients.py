"""Many streaming clients against one at a time, over HTTP: tokens/s, losses, and whether the answers agree.

    python bench/clients.py [MODEL] [--clients 16] [--tokens 128] [--url http://127.0.0.1:8000] [--json]

Without --url a server is started on a free port of the loopback interface and stopped at the end. All requests are
greedy with `ignore_eos`, so both passes produce the same number of tokens. First the prompts run one after another,
then all at once; answers must be equal to the character.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import sys
import time

import httpx
from serving import served

TOPICS = [
    "rivers",
    "bread",
    "sorting algorithms",
    "the moon",
    "violins",
    "glaciers",
    "democracy",
    "bees",
    "steam engines",
    "chess",
    "volcanoes",
    "the printing press",
    "vaccines",
    "lighthouses",
    "silk",
    "prime numbers",
]


async def ask(client, model, prompt, tokens, salt):
    """One streamed chat answer: text, completion tokens, seconds to the first token, seconds between tokens."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": tokens,
        "cache_salt": salt,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    text, stamps, completion = [], [], 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                completion = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                if choice["delta"].get("content"):
                    text.append(choice["delta"]["content"])
                    stamps.append(time.perf_counter())
    gaps = [b - a for a, b in itertools.pairwise(stamps)]
    return "".join(text), completion, stamps[0] - started, gaps


async def measure(url, model, clients, tokens):
    """Both passes. Returns a dict of figures."""
    prompts = [f"Tell me three facts about {TOPICS[i % len(TOPICS)]} ({i})." for i in range(clients)]
    limits = httpx.Limits(max_connections=clients + 1)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await ask(client, model, "Hello", 8, "first")
        started = time.perf_counter()
        # Salts of their own: neither pass finds what the other has computed.
        quiet = [await ask(client, model, prompt, tokens, "one by one") for prompt in prompts]
        alone = time.perf_counter() - started
        started = time.perf_counter()
        crowd = await asyncio.gather(
            *(ask(client, model, prompt, tokens, "together") for prompt in prompts), return_exceptions=True
        )
        together = time.perf_counter() - started
    answers = [c for c in crowd if not isinstance(c, BaseException)]
    total_quiet, total_crowd = sum(q[1] for q in quiet), sum(a[1] for a in answers)

    def p(values, q):
        return statistics.quantiles(values, n=100)[q - 1] if len(values) > 1 else values[0]

    gaps = [g for a in answers for g in a[3]]
    return {
        "clients": clients,
        "tokens_each": tokens,
        "lost": clients - len(answers),
        "different_answers": sum(
            c[0] != q[0] for c, q in zip(crowd, quiet, strict=True) if not isinstance(c, BaseException)
        ),
        "one_at_a_time_tokens_per_s": total_quiet / alone,
        "together_tokens_per_s": total_crowd / together,
        "ratio": (total_crowd / together) / (total_quiet / alone),
        "ttft_s": {
            "alone_median": statistics.median(q[2] for q in quiet),
            "together_median": statistics.median(a[2] for a in answers),
        },
        "itl_s": {"together_p50": p(gaps, 50), "together_p99": p(gaps, 99)},
    }


def report(result):
    """Prints the figures as three lines."""
    ttft, itl = result["ttft_s"], result["itl_s"]
    alone, together = result["one_at_a_time_tokens_per_s"], result["together_tokens_per_s"]
    print(f"one at a time  {alone:8.1f} tokens/s   TTFT {ttft['alone_median'] * 1e3:.0f} ms")
    print(
        f"{result['clients']:2} at once     {together:8.1f} tokens/s   "
        f"TTFT {ttft['together_median'] * 1e3:.0f} ms   "
        f"ITL p50 {itl['together_p50'] * 1e3:.1f} ms, p99 {itl['together_p99'] * 1e3:.1f} ms"
    )
    print(
        f"ratio {result['ratio']:.2f}×   lost {result['lost']}   "
        f"answers that differ from the quiet server's: {result['different_answers']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--url")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(served(options.model)).url
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        result = asyncio.run(measure(url, model, options.clients, options.tokens))
    if options.json:
        print(json.dumps(result))
    else:
        report(result)
    sys.exit(1 if result["lost"] or result["different_answers"] else 0)


if __name__ == "__main__":
    main()
