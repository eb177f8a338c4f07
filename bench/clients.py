"""Many streaming clients against one at a time, over HTTP: tokens/s, losses, and whether the answers agree.

    python bench/clients.py [MODEL] [--clients 16] [--tokens 128] [--url http://127.0.0.1:8000] [--json]

Without --url a server is started on a free port of the loopback interface and stopped at the end. All requests are
greedy with `ignore_eos`, so both passes produce the same number of tokens. First the prompts run one after another,
then all at once; answers must be equal to the character.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time

from asking import ask
from serving import served

from kvarn.bench.serve.client import Target, open_client
from kvarn.bench.serve.ranks import Distribution

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


def body(model, prompt, tokens, salt):
    """A chat request. salt: so that no pass finds what another has computed."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": tokens,
        "cache_salt": salt,
        "ignore_eos": True,
    }


async def measure(url, clients, tokens):
    """Both passes. Returns a dict of figures."""
    prompts = [f"Tell me three facts about {TOPICS[i % len(TOPICS)]} ({i})." for i in range(clients)]
    async with open_client(Target(url)) as client:
        model = (await client.models())[0]
        await ask(client, body(model, "Hello", 8, "first"))
        started = time.perf_counter()
        quiet = [await ask(client, body(model, prompt, tokens, "one by one")) for prompt in prompts]
        alone = time.perf_counter() - started
        started = time.perf_counter()
        crowd = await asyncio.gather(
            *(ask(client, body(model, prompt, tokens, "together")) for prompt in prompts), return_exceptions=True
        )
        together = time.perf_counter() - started
    answers = [answer for answer in crowd if not isinstance(answer, BaseException)]
    gaps = Distribution.of(gap for answer in answers for gap in answer.gaps)
    total_quiet, total_crowd = (sum(answer.output_tokens for answer in several) for several in (quiet, answers))
    return {
        "clients": clients,
        "tokens_each": tokens,
        "lost": clients - len(answers),
        "different_answers": sum(
            c.text != q.text for c, q in zip(crowd, quiet, strict=True) if not isinstance(c, BaseException)
        ),
        "one_at_a_time_tokens_per_s": total_quiet / alone,
        "together_tokens_per_s": total_crowd / together,
        "ratio": (total_crowd / together) / (total_quiet / alone),
        "ttft_s": {
            "alone_median": statistics.median(answer.ttft for answer in quiet),
            "together_median": statistics.median(answer.ttft for answer in answers),
        },
        "itl_s": {"together_p50": gaps.p50, "together_p99": gaps.p99},
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
        result = asyncio.run(measure(url, options.clients, options.tokens))
    if options.json:
        print(json.dumps(result))
    else:
        report(result)
    sys.exit(1 if result["lost"] or result["different_answers"] else 0)


if __name__ == "__main__":
    main()
