"""When requests are sent in an open loop: whether or not earlier ones are answered."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from kvarn.errors import ConfigError

KINDS = ("poisson", "gamma", "burst", "constant")
MOST_RATE = 100_000.0


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How moments lie, at one rate on average. Raises ConfigError naming the option.

    poisson: independent of each other, as many users are. gamma: gaps of a gamma distribution of shape `burstiness`;
    1 is poisson, smaller is burstier, larger more even. burst: `burst` at the same time, at independent moments.
    constant: at even distances.
    """

    kind: str = "poisson"
    burstiness: float = 1.0
    burst: int = 16

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"--arrivals must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if not (math.isfinite(self.burstiness) and 1e-3 <= self.burstiness <= 1e3):
            raise ConfigError(f"--burstiness must be between 0.001 and 1000, not {self.burstiness}")
        if not 1 <= self.burst <= 10_000:
            raise ConfigError(f"--burst must be between 1 and 10000, not {self.burst}")

    def times(self, rate: float, seed: str) -> Iterator[float]:
        """Seconds since the begin, endlessly, `rate` a second on average; the same for the same seed."""
        if not (math.isfinite(rate) and 0 < rate <= MOST_RATE):
            raise ConfigError(f"--rate must be above 0 and at most {MOST_RATE:g}, not {rate}")
        return self._times(rate, random.Random(f"arrivals {seed}"))

    def _times(self, rate: float, numbers: random.Random) -> Iterator[float]:
        together = self.burst if self.kind == "burst" else 1
        time = 0.0
        while True:
            time += self._gap(rate / together, numbers)
            for _ in range(together):
                yield time

    def _gap(self, rate: float, numbers: random.Random) -> float:
        if self.kind == "constant":
            return 1 / rate
        if self.kind == "gamma":
            return numbers.gammavariate(self.burstiness, 1 / (rate * self.burstiness))
        return numbers.expovariate(rate)
