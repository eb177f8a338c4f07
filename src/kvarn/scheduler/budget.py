"""How many tokens a step may have: `Budget`, the constant one, and one that keeps running streams to an ITL target."""

from __future__ import annotations

import bisect
from typing import Protocol

from kvarn.scheduler.cost import StepCost, StepShape

MIN_PROMPT_TOKENS = 16
"""Prompt tokens that a step may have whatever the target is, so that prompts get on."""
MARGIN = 0.85
"""Of the target that a step is planned to take: predictions err, and a token's way to its reader is not in them."""


class StepBudget(Protocol):
    """What is left of one step while it is put together. Decodes are taken off when it is opened."""

    def room(self, start: int, wanted: int, reserved: int) -> int:
        """How many of a sequence's `wanted` tokens from position `start` on may be computed; 0 where none.

        reserved: tokens to leave for others.
        """
        ...

    def take(self, start: int, count: int) -> None:
        """Spends what `room` said, or less."""
        ...


class Budget(Protocol):
    """Opens the budget of each step."""

    def open(self, decodes: StepShape) -> StepBudget:
        """decodes: the sequences that compute one token each, for which the budget always has room, with their drafts:
        no more than `draft_room` said."""
        ...

    def draft_room(self, decodes: StepShape, reserved: int) -> int:
        """Tokens that may be guessed ahead in a step of these decodes; negative or 0: none.

        reserved: tokens to leave for others.
        """
        ...


class ConstantBudget:
    """The same number of tokens for every step."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    def open(self, decodes: StepShape) -> StepBudget:
        """What decodes leave is for prompts."""
        return _Tokens(self._max_tokens - decodes.num_tokens)

    def draft_room(self, decodes: StepShape, reserved: int) -> int:
        """What decodes and others leave."""
        return self._max_tokens - decodes.num_tokens - reserved


class _Tokens:
    """A number of tokens."""

    def __init__(self, left: int) -> None:
        self.left = left

    def room(self, start: int, wanted: int, reserved: int) -> int:
        """See `StepBudget`."""
        del start
        return max(0, min(wanted, self.left - reserved))

    def take(self, start: int, count: int) -> None:
        """See `StepBudget`."""
        del start
        self.left -= count


class ItlBudget:
    """Prompts get as much of a step as keeps its predicted time within a target, where streams are running.

    Chunked prefill beside decodes as in Sarathi-Serve (Agrawal et al. 2024, section 4.2), but with a chunk's size from
    the measured cost of steps. A step has `MIN_PROMPT_TOKENS` of prompts in any case, without decodes `max_tokens`.
    """

    def __init__(self, max_tokens: int, target: float, cost: StepCost) -> None:
        """target: seconds that a step with decodes may take."""
        self._max_tokens = max_tokens
        self._target = MARGIN * target
        self._cost = cost

    def open(self, decodes: StepShape) -> StepBudget:
        """Timed where there are decodes."""
        left = self._max_tokens - decodes.num_tokens
        if not decodes.num_tokens:
            return _Tokens(left)
        return _TimedTokens(left, decodes, self._target, self._cost)

    def draft_room(self, decodes: StepShape, reserved: int) -> int:
        """As many as keep the step within the target."""
        most = max(0, self._max_tokens - decodes.num_tokens - reserved)
        length = decodes.num_context // max(1, decodes.num_sequences)
        return bisect.bisect_right(
            range(1, most + 1), self._target, key=lambda count: self._cost.seconds(decodes.drafted(length, count))
        )


class _TimedTokens(_Tokens):
    """A number of tokens, and a time."""

    def __init__(self, left: int, shape: StepShape, target: float, cost: StepCost) -> None:
        super().__init__(left)
        self._shape = shape
        self._target = target
        self._cost = cost
        self._floor = MIN_PROMPT_TOKENS

    def room(self, start: int, wanted: int, reserved: int) -> int:
        """See `StepBudget`."""
        most = super().room(start, wanted, reserved)
        within = bisect.bisect_right(
            range(1, most + 1), self._target, key=lambda count: self._cost.seconds(self._shape.plus(start, count))
        )
        return max(within, min(most, self._floor))

    def take(self, start: int, count: int) -> None:
        """See `StepBudget`."""
        super().take(start, count)
        self._shape = self._shape.plus(start, count)
        self._floor = max(0, self._floor - count)
