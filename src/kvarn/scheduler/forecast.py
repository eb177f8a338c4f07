"""When a request that comes now would get its first token: `Forecast`, and the one for who does not want to know."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Protocol

from kvarn.scheduler.budget import Budget
from kvarn.scheduler.cost import StepCost, StepShape
from kvarn.scheduler.sequence import Sequence

MEMORY = 32
"""Answers over which the length of an answer is averaged."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """What a request finds when it comes. free_blocks: all that no sequence holds.

    blocks_for: most blocks that a sequence of so many tokens holds.
    """

    running: ListOf[Sequence]
    prompts: ListOf[Sequence]
    """Those of the running ones that have prompts to compute and are before it."""
    ahead: ListOf[Sequence]
    """Those that wait and will be admitted before it."""
    max_num_seqs: int
    free_blocks: int
    blocks_for: Callable[[int], int]


class Forecast(Protocol):
    """Predicts."""

    def ttft(self, sequence: Sequence, crowd: Crowd) -> float:
        """Seconds from now to the first token of a sequence that has just come; 0 where nobody is before it."""
        ...

    def ended(self, sequence: Sequence) -> None:
        """Told of each sequence that has ended by itself, to learn how long answers are."""
        ...


class NoForecast:
    """Expects everything at once."""

    def ttft(self, sequence: Sequence, crowd: Crowd) -> float:
        """0."""
        del sequence, crowd
        return 0.0

    def ended(self, sequence: Sequence) -> None:
        """Learns nothing."""


class QueueForecast:
    """From the prompts before it, the sequences that must end before there is room, and the measured cost of steps.

    A request waits for the longer of two: until the prompts ahead of it are computed, beside decodes and within the
    budget, and until so many running sequences have ended that there is a place and blocks for it. How long answers
    will be is not known: the mean of those that ended, no longer than they may be. Then its own prompt is computed.

    Of a prompt that waits counts what the prefix cache did not have of it when it came. What it will find because
    another before it computes the same, or in the second tier, is not foreseen; nor what is evicted by then.
    """

    def __init__(self, budget: Budget, cost: StepCost) -> None:
        self._budget = budget
        self._cost = cost
        self._mean_output = 0.0
        self._num_ended = 0

    def ttft(self, sequence: Sequence, crowd: Crowd) -> float:
        """See `Forecast`."""
        if not crowd.running and not crowd.ahead:
            return 0.0
        # Those ahead become decodes one after the other: half of them on average.
        busy = min(len(crowd.running) + len(crowd.ahead) // 2, crowd.max_num_seqs)
        places = self._steps_to_a_place(sequence, crowd) * self._cost.seconds(_decodes(crowd, busy))
        decodes = _decodes(crowd, min(busy, crowd.max_num_seqs - 1))
        prompts = self._compute([*crowd.prompts, *crowd.ahead], decodes)
        return max(prompts, places) + self._compute([sequence], decodes)

    def ended(self, sequence: Sequence) -> None:
        """See `Forecast`."""
        self._num_ended = min(self._num_ended + 1, MEMORY)
        self._mean_output += (sequence.num_output_tokens - self._mean_output) / self._num_ended

    def _compute(self, prompts: ListOf[Sequence], decodes: StepShape) -> float:
        """Seconds for what is left of prompts, in steps that have the decodes too."""
        tokens = sum(_to_compute(s) for s in prompts)
        start = sum(s.num_tokens - _to_compute(s) // 2 for s in prompts) // max(1, len(prompts))  # of a typical chunk
        chunk = max(1, self._budget.open(decodes).room(start, tokens, 0))
        steps, rest = divmod(tokens, chunk)
        seconds = steps * self._cost.seconds(decodes.plus(start, chunk))
        return seconds + (self._cost.seconds(decodes.plus(start, rest)) if rest else 0.0)

    def _steps_to_a_place(self, sequence: Sequence, crowd: Crowd) -> float:
        """Steps until enough running sequences have ended."""
        places = crowd.max_num_seqs - len(crowd.running) - len(crowd.ahead) - 1
        blocks = crowd.free_blocks
        for waiting in (*crowd.ahead, sequence):
            blocks -= crowd.blocks_for(waiting.num_tokens) - waiting.expected_hit.num_held_blocks
        steps = 0.0
        for left, held in sorted((self._left(s), s.table.num_held) for s in crowd.running):
            if places >= 0 and blocks >= 0:
                return steps
            steps, places, blocks = left, places + 1, blocks + held
        # Those ahead take places too, and must end in their turn.
        rounds = max(0, -places) / crowd.max_num_seqs
        return steps + rounds * (self._mean_output or steps)

    def _left(self, sequence: Sequence) -> float:
        """Steps that a running sequence is expected to go on for."""
        most = sequence.max_length - sequence.num_tokens
        if not self._num_ended:
            return most
        return min(most, max(1.0, self._mean_output - sequence.num_output_tokens))


def _to_compute(sequence: Sequence) -> int:
    """Tokens, at least 1."""
    if sequence.num_computed_tokens:
        return sequence.num_uncomputed_tokens
    return max(1, sequence.num_tokens - sequence.expected_hit.num_tokens)


def _decodes(crowd: Crowd, count: int) -> StepShape:
    """So many decodes of typical length."""
    lengths = [s.num_tokens for s in (*crowd.running, *crowd.ahead)]
    return StepShape(count, count, count, sum(lengths) * count // len(lengths))
