"""`FittedStepCost`: what a step costs, from a few numbers that were fitted to measurements."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass

from kvarn.errors import ConfigError
from kvarn.scheduler.cost import StepShape


@dataclass(frozen=True, slots=True)
class FittedStepCost:
    """Seconds of a step: piecewise linear in its tokens, linear in its sampled rows, attended and read keys.

    Below the first knot the first value holds, beyond the last knot the last slope.
    """

    knots: tuple[int, ...]
    """Numbers of tokens, ascending, at least two."""
    at_knots: tuple[float, ...]
    """Seconds of a step of so many tokens, without the terms below."""
    per_sampled: float
    per_attended: float
    """Of each pair of a query and a key it looks at (arithmetic)."""
    per_context: float
    """Of each key that is read (memory)."""

    def __post_init__(self) -> None:
        values = (*self.at_knots, self.per_sampled, self.per_attended, self.per_context)
        if len(self.knots) < 2 or len(self.knots) != len(self.at_knots):
            raise ConfigError(f"a step cost needs two or more knots with a value each, not {len(self.knots)}")
        if list(self.knots) != sorted(set(self.knots)) or self.knots[0] < 0:
            raise ConfigError("the knots of a step cost must be ascending numbers of tokens")
        if not all(math.isfinite(value) and value >= 0 for value in values) or self.at_knots[0] <= 0:
            raise ConfigError("the numbers of a step cost must be seconds of at least 0, and above 0 at the first knot")

    def seconds(self, shape: StepShape) -> float:
        """Wall time of a step of that shape."""
        return (
            self._of_tokens(shape.num_tokens)
            + self.per_sampled * shape.num_sampled
            + self.per_attended * shape.num_attended
            + self.per_context * shape.num_context
        )

    def decode_run(self, sequences: int, attended: int, steps: int) -> Iterator[float]:
        """Seconds of steps of one token for each of so many sequences, one step after the other.

        attended: keys of the first step, to which each step adds one a sequence. To the bit what `seconds` says.
        """
        fixed = self._of_tokens(sequences) + self.per_sampled * sequences
        for keys in range(attended, attended + steps * sequences, sequences):
            yield fixed + self.per_attended * keys + self.per_context * keys

    def _of_tokens(self, tokens: int) -> float:
        knots, values = self.knots, self.at_knots
        if tokens <= knots[0]:
            return values[0]
        right = min(bisect.bisect_left(knots, tokens), len(knots) - 1)
        left = right - 1
        slope = (values[right] - values[left]) / (knots[right] - knots[left])
        return max(values[0], values[left] + slope * (tokens - knots[left]))
