"""What the prefix cache saves, measured over HTTP: starts `kvarn serve` on a free port and talks to it as clients do.

    PYTHONPATH=src python bench/prefix_cache.py MODEL [MODEL …] [--rounds 5] [--system-tokens 1000] [--threads 0]

For each model: TTFT of a request with a system prompt that the server has not seen (a miss), of one with a system
prompt that it has (a hit; another question), both with a `cache_salt` and in turns; and what the second turn of a
conversation computes. Tokens computed are prompt tokens less `usage.prompt_tokens_details.cached_tokens`. Prints a
table and exits with 1 where a hit takes more than 15 % of a miss, or a second turn computes more than its new tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import json
import statistics
import time
from typing import Any

from serving import served

WORDS = (
    "river mill wheel stone grain flour water miller sack bread field horse cart road bridge village winter summer "
    "morning evening master apprentice hammer iron rope floor roof window door candle kitchen table letter"
)
HIT_SHARE = 0.15


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One streamed chat answer. ttft: seconds from sending the request to the first piece of text."""

    ttft: float
    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    @property
    def computed(self) -> int:
        """Tokens of the prompt that were computed."""
        return self.prompt_tokens - self.cached_tokens


def ask(address: tuple[str, int], messages: list[dict[str, str]], salt: str, max_tokens: int) -> Answer:
    """Streams one greedy answer."""
    body = {
        "messages": messages, "cache_salt": salt, "max_tokens": max_tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    connection = http.client.HTTPConnection(*address, timeout=300)
    with contextlib.closing(connection):
        started = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{response.status}: {response.read().decode()}")
        ttft, text, usage = None, "", None
        for line in response:
            event = line.decode().removeprefix("data: ").strip()
            if not event or event == "[DONE]":
                continue
            chunk: dict[str, Any] = json.loads(event)
            if chunk["choices"] and "content" in (delta := chunk["choices"][0]["delta"]):
                text += delta["content"] or ""
                if text and ttft is None:
                    ttft = time.perf_counter() - started
            usage = chunk.get("usage") or usage
    assert ttft is not None and usage is not None
    return Answer(ttft, text, *usage_counts(usage))


def usage_counts(usage: dict[str, Any]) -> tuple[int, int, int]:
    """Prompt, cached and completion tokens of an answer's `usage`."""
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], usage["completion_tokens"]


def system_prompt(address: tuple[str, int], tokens: int, number: int) -> str:
    """Words that make about that many tokens; every number another text from its first word on."""
    kinds = WORDS.split()
    words = [kinds[(number * 7 + i * (number + 3)) % len(kinds)] for i in range(tokens)]
    while True:
        text = f"{number} " + " ".join(words)
        taken = ask(address, [{"role": "system", "content": text}, {"role": "user", "content": "?"}], "length", 1)
        over = taken.prompt_tokens - tokens
        if abs(over) <= 20:
            return text
        words = words[: len(words) - over] if over > 0 else words + words[: -over]


def conversation(system: str, question: str) -> list[dict[str, str]]:
    """A system prompt and one question."""
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def measure(model: str, rounds: int, system_tokens: int, threads: int) -> bool:
    """Prints the figures of one model; whether they are as they should be."""
    with served(model, "--threads", str(threads)) as server:
        address = server.address
        misses, hits = [], []
        system = system_prompt(address, system_tokens, 1)
        for round_number in range(rounds):
            # Another salt is another cache: the same text is a miss again.
            salt = f"round {round_number}"
            misses.append(ask(address, conversation(system, "Who mends the wheel?"), salt, 8))
            hits.append(ask(address, conversation(system, "What does the bread cost today?"), salt, 8))
        talk = conversation(system, "Tell me of the mill.")
        first = ask(address, talk, "talk", 48)
        talk += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And of the river?"}]
        second = ask(address, talk, "talk", 8)
    miss, hit = (statistics.median(a.ttft for a in answers) for answers in (misses, hits))
    new = second.prompt_tokens - first.prompt_tokens - first.completion_tokens
    print(f"\n{model}")
    print(f"  {'':24}{'prompt':>8}{'cached':>8}{'computed':>10}{'TTFT, median (least … most)':>34}")
    for name, answers in (("miss", misses), ("hit", hits), ("first turn", [first]), ("second turn", [second])):
        times = sorted(1000 * a.ttft for a in answers)
        shown = f"{statistics.median(times):.1f} ms ({times[0]:.1f} … {times[-1]:.1f})"
        last = answers[-1]
        print(f"  {name:24}{last.prompt_tokens:>8}{last.cached_tokens:>8}{last.computed:>10}{shown:>34}")
    print(f"  a hit takes {hit / miss:.1%} of a miss")
    print(f"  the second turn has {new} new tokens and computes {second.computed}")
    # The last token of the first answer was sampled, but not computed.
    return hit <= HIT_SHARE * miss and second.computed <= new + 1


def main() -> None:
    """Measures all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--system-tokens", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    good = [measure(model, given.rounds, given.system_tokens, given.threads) for model in given.models]
    raise SystemExit(not all(good))


if __name__ == "__main__":
    main()
