"""A KV cache of one tenth of what 64 clients work on: what it costs, and what the second tier gives back.

    PYTHONPATH=src python bench/pressure.py MODEL [MODEL …] [--clients 64] [--turns 3] [--share 0.1] [--rounds 3]

Each client has a conversation of its own: every turn says all that was said before and something new, and waits for the
answer (greedy, of a given length). Four engines do the same work in turns: with room for everything; with the cache
pressed, what is evicted or preempted computed again; pressed, with a second tier used by measured cost, as kvarn does
where it has one; and pressed, with a tier into which everything is moved, whatever it costs. Prints a table, and says
whether all answers are the same, and none is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from kvarn.config import CacheConfig, EngineConfig, SchedulerConfig
from kvarn.engine import AsyncLLM, EngineStats
from kvarn.request import Request, SamplingParams
from kvarn.scheduler import AlwaysMove

BLOCK = 16
FIRST, NEW, ANSWER = 240, 40, 100
"""Tokens of a conversation's first message, of each later one, of each answer."""


@dataclass(frozen=True)
class Outcome:
    """What one engine did."""

    seconds: float
    ttft: float
    """The median, in seconds."""
    said: tuple[tuple[int, ...], ...]
    """Each client's answers, one after the other."""
    stats: EngineStats


def opening(client: int, vocab_size: int) -> tuple[int, ...]:
    """Tokens of a client's first message; any tokens do for counting."""
    return tuple((client * 7919 + i * (client + 31) * 104729) % (vocab_size // 2) for i in range(FIRST))


async def talk(llm: AsyncLLM, client: int, turns: int, run: str, first_tokens: list[float]) -> tuple[int, ...]:
    """One client's conversation; its answers."""
    vocab_size, said = llm.tokenizer.vocab_size, []
    text = opening(client, vocab_size)
    for turn in range(turns):
        sampling = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True)
        answer: list[int] = []
        started = time.perf_counter()
        async for output in llm.generate(Request(f"{run}-{client}-{turn}", text, sampling)):
            if not answer:
                first_tokens.append(time.perf_counter() - started)
            answer += output.outputs[0].token_ids
        said += answer
        text += tuple(answer) + tuple(t + 1 for t in opening(client + turn, vocab_size)[:NEW])
    return tuple(said)


async def work(model: str, cache: CacheConfig, clients: int, turns: int, threads: int) -> Outcome:
    """All conversations at once, on an engine of their own."""
    scheduler = SchedulerConfig(max_num_seqs=clients, max_num_queued_requests=clients)
    config = EngineConfig(threads=threads, cache=cache, scheduler=scheduler)
    llm = await asyncio.to_thread(AsyncLLM.from_model, model, config)
    async with llm:
        async for _ in llm.generate(Request("warm-up", (1, 2, 3), SamplingParams(max_tokens=4))):
            pass
        first_tokens: list[float] = []
        started = time.perf_counter()
        said = await asyncio.gather(*(talk(llm, c, turns, "run", first_tokens) for c in range(clients)))
        seconds = time.perf_counter() - started
        return Outcome(seconds, statistics.median(first_tokens), tuple(said), llm.stats())


def measure(model: str, clients: int, turns: int, share: float, rounds: int, threads: int) -> bool:
    """Prints the figures of one model; whether all answers agree."""
    length = FIRST + turns * (ANSWER + NEW)
    working_set = clients * -(-length // BLOCK)
    pressed = max(int(share * working_set), -(-length // BLOCK) + 2)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        tier = {"num_blocks": pressed, "kv_offload_bytes": 8 << 30}
        always: Callable[..., AlwaysMove] = lambda *_: AlwaysMove()  # noqa: E731
        ways = {
            "room for everything": (CacheConfig(num_blocks=working_set + clients), None),
            "pressed: recompute": (CacheConfig(num_blocks=pressed), None),
            "pressed: tier by measured cost": (CacheConfig(**tier, kv_offload_dir=f"{folder}/cost"), None),
            "pressed: tier for everything": (CacheConfig(**tier, kv_offload_dir=f"{folder}/all"), always),
        }
        outcomes: dict[str, list[Outcome]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (cache, moves) in ways.items():
                for file in Path(folder).rglob("*.kv*"):
                    file.unlink()
                forced = nullcontext() if moves is None else mock.patch("kvarn.engine.load.MoveCost", moves)
                with forced:
                    outcomes[name].append(asyncio.run(work(model, cache, clients, turns, threads)))
    return report(model, working_set, pressed, outcomes)


def report(model: str, working_set: int, pressed: int, outcomes: dict[str, list[Outcome]]) -> bool:
    """Prints the table."""
    print(f"{Path(model).stem}: working set {working_set} blocks, pressed to {pressed}")
    print(f"  {'tokens/s':>54}{'TTFT P50':>10}{'preempted':>11}{'evicted':>9}{'saved':>8}{'loaded':>8}{'hits':>8}")
    expected = next(iter(outcomes.values()))[0].said
    same = True
    for name, runs in outcomes.items():
        speeds = sorted(sum(map(len, run.said)) / run.seconds for run in runs)
        speed = f"{statistics.median(speeds):.0f} ({speeds[0]:.0f} … {speeds[-1]:.0f})"
        last, ttft = runs[-1].stats, statistics.median(run.ttft for run in runs)
        print(
            f"  {name:32}{speed:>22}{ttft:>8.2f} s{last.preemptions:>11}{last.evicted_tokens:>9}"
            f"{last.saved_tokens:>8}{last.loaded_tokens:>8}{last.prefix_hits:>8}"
        )
        same = same and all(run.said == expected for run in runs)
    print(f"  answers {'are the same in all runs, none is missing' if same else 'DIFFER'}")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.1, help="of the working set that the pressed cache holds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    args = parser.parse_args()
    good = [measure(m, args.clients, args.turns, args.share, args.rounds, args.threads) for m in args.models]
    raise SystemExit(not all(good))


if __name__ == "__main__":
    main()
