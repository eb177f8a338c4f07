"""Lengths of prompts and answers: one, a range, or a distribution."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from kvarn.errors import ConfigError

MOST_TOKENS = 1_000_000
MOST_SPREAD = 3.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens from `low` to `high`: evenly distributed, or log-normal with that `mean` where `spread` is given."""

    low: int
    high: int
    mean: float
    spread: float | None = None
    """Standard deviation of the logarithm."""

    @staticmethod
    def parse(option: str, text: str) -> Lengths:
        """`256`, `64-512`, or `lognormal:MEAN,SPREAD`. Raises ConfigError naming the option."""
        try:
            if text.startswith("lognormal:"):
                mean, spread = (float(part) for part in text.removeprefix("lognormal:").split(","))
                lengths = Lengths(1, MOST_TOKENS, mean, spread)
            else:
                low, _, high = text.partition("-")
                lengths = Lengths(int(low), int(high or low), (int(low) + int(high or low)) / 2)
        except ValueError:
            raise ConfigError(f"--{option} must be as 256, 64-512 or lognormal:256,0.6, not {text!r}") from None
        lengths._check(option)
        return lengths

    def _check(self, option: str) -> None:
        for value in (self.low, self.high, self.mean):
            if not (math.isfinite(value) and 1 <= value <= MOST_TOKENS):
                raise ConfigError(f"--{option} must be between 1 and {MOST_TOKENS} tokens, not {value:g}")
        if self.low > self.high:
            raise ConfigError(f"--{option}: {self.low} is more than {self.high}")
        if self.spread is not None and not 0 < self.spread <= MOST_SPREAD:
            raise ConfigError(f"--{option}: the spread must be above 0 and at most {MOST_SPREAD:g}, not {self.spread}")

    def __str__(self) -> str:
        if self.spread is not None:
            return f"lognormal {self.mean:g} ({self.spread:g})"
        return f"{self.low}" if self.low == self.high else f"{self.low}-{self.high}"

    def draw(self, numbers: random.Random) -> int:
        """One length."""
        if self.spread is None:
            return numbers.randint(self.low, self.high)
        drawn = numbers.lognormvariate(math.log(self.mean) - self.spread**2 / 2, self.spread)
        return min(self.high, max(self.low, round(drawn)))
