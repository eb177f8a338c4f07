"""The work whose time is taken: prompts and decode steps of a program, without tokenizer or sampler."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from kvarn.errors import ConfigError
from kvarn.program.counts import StepShape

CHUNK = 512
"""Tokens of a prompt that one step computes."""
CARD_CHUNK = 8192
"""The same on a card, which wants about so many for `--max-num-batched-tokens`."""
DECODE_STEPS = 128
OTHER_STEPS = 32
"""Decode steps at depth and of batches."""
COMPARED_BATCH = 16


@dataclass(frozen=True, slots=True)
class Task:
    """prefill: one prompt of `tokens`, logits of the last. decode: `tokens` steps of one token for each of `batch`
    sequences, which have `depth` tokens of context before; that context is made beforehand and not timed. chunk: tokens
    of a prompt that one step computes."""

    name: str
    op: Literal["prefill", "decode"]
    tokens: int
    batch: int = 1
    depth: int = 0
    chunk: int = CHUNK

    @property
    def total_tokens(self) -> int:
        """Tokens that the timed work computes, over all sequences."""
        return self.tokens * self.batch

    @property
    def num_steps(self) -> int:
        """Steps that are timed."""
        return self.tokens if self.op == "decode" else -(-self.tokens // self.chunk)

    def steps(self) -> Iterator[StepShape]:
        """The shapes of the timed steps."""
        if self.op == "decode":
            for step in range(self.tokens):
                yield StepShape.decode(self.batch, self.depth + step + 1)
            return
        for start, end in chunks(self.tokens, self.chunk):
            yield StepShape(((end - start, end),), int(end == self.tokens))

    def message(self) -> dict[str, Any]:
        """What a worker is told, whose chunks are `CHUNK`."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in ("name", "chunk")}

    @staticmethod
    def of(message: dict[str, Any]) -> Task:
        """The task of a message."""
        return Task("", message["op"], int(message["tokens"]), int(message["batch"]), int(message["depth"]))


def chunks(tokens: int, chunk: int = CHUNK) -> Iterator[tuple[int, int]]:
    """(begin, end) of the steps that compute a prompt."""
    for start in range(0, tokens, chunk):
        yield start, min(tokens, start + chunk)


def worker_messages(tasks: Iterable[Task]) -> str:
    """All tasks as the JSON list that workers get when they are started."""
    return json.dumps([task.message() for task in tasks])


def latency_tasks(
    *, prefill: int, decode: int, depth: int, batches: Iterable[int], chunk: int = CHUNK
) -> tuple[Task, ...]:
    """What `kvarn bench latency` times. decode: steps of one sequence. depth 0: no decode at depth."""
    tasks = [Task(f"prefill {prefill}", "prefill", prefill, chunk=chunk)]
    for batch in batches:
        steps = decode if batch == 1 else min(decode, OTHER_STEPS)
        tasks.append(Task(f"decode, batch {batch}", "decode", steps, batch, chunk=chunk))
    if depth:
        tasks.append(Task(f"decode at {depth}", "decode", min(decode, OTHER_STEPS), 1, depth, chunk))
    return tuple(tasks)


def compare_tasks(depth: int) -> tuple[Task, ...]:
    """What `kvarn bench compare` times."""
    return latency_tasks(prefill=CHUNK, decode=DECODE_STEPS, depth=depth, batches=(1, COMPARED_BATCH))


def check_tasks(tasks: Iterable[Task], max_positions: int) -> None:
    """Raises ConfigError where a sequence would be longer than the model's positions."""
    for task in tasks:
        if task.depth + task.tokens > max_positions:
            option = "depth" if task.depth else task.op
            most = max_positions - (task.tokens if task.depth else 0)
            wanted = task.depth or task.tokens
            raise ConfigError(f"--{option} must be at most {most} for this model, not {wanted}")


def default_depth(max_positions: int) -> int:
    """4096 tokens of context, or what the model has room for."""
    return max(0, min(4096, max_positions - OTHER_STEPS))
