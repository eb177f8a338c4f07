"""Traffic made up from a few numbers and a seed."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from kvarn.errors import ConfigError
from kvarn.traffic import MAX_REQUESTS, Arrival

KINDS = ("poisson", "burst", "long-tail")
BURST = 16
"""Requests that come at once."""
LOG_SPREAD = 0.6
"""Standard deviation of the logarithm of lengths."""
TAIL = 1.2
"""Exponent of the Pareto distribution of answers with a long tail: most are short, a few take most of the tokens."""
TAIL_LIMIT = 16
"""Times the mean that such an answer has at most."""


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Requests at `rate` a second on average.

    poisson: at independent times, lengths log-normal. burst: `BURST` at the same time, lengths log-normal. long-tail:
    at independent times, answers of a Pareto distribution. Raises ConfigError naming the setting.
    """

    kind: str
    rate: float
    requests: int
    prompt_tokens: int
    """Mean."""
    output_tokens: int
    """Mean."""
    tenants: int = 1
    """Requests are of each tenant in turn."""
    prefix_groups: int = 0
    """Requests are of each group in turn; 0: nothing is shared."""
    prefix_tokens: int = 0
    """Tokens that a group shares, before those of the prompt."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"traffic must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ConfigError(f"rate must be above 0, not {self.rate}")
        for name, least, most in (
            ("requests", 1, MAX_REQUESTS), ("prompt_tokens", 1, 1_000_000), ("output_tokens", 1, 1_000_000),
            ("tenants", 1, 10_000), ("prefix_groups", 0, 1_000_000), ("prefix_tokens", 0, 1_000_000),
        ):  # fmt: skip
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(f"{name} must be between {least} and {most}, not {value}")
        if bool(self.prefix_groups) != bool(self.prefix_tokens):
            raise ConfigError("prefix_groups and prefix_tokens must be given together")


def make_traffic(settings: Synthetic) -> list[Arrival]:
    """The same requests for the same settings."""
    numbers = random.Random(settings.seed)
    several = zip(range(settings.requests), _times(settings, numbers), strict=False)
    return [_arrival(settings, numbers, index, time) for index, time in several]


def _arrival(settings: Synthetic, numbers: random.Random, index: int, time: float) -> Arrival:
    draw = _pareto if settings.kind == "long-tail" else _log_normal
    own = _log_normal(numbers, settings.prompt_tokens)
    shared = settings.prefix_tokens
    return Arrival(
        time,
        own + shared,
        draw(numbers, settings.output_tokens),
        f"tenant-{index % settings.tenants}" if settings.tenants > 1 else "",
        f"group-{index % settings.prefix_groups}" if shared else "",
        shared,
    )


def _times(settings: Synthetic, numbers: random.Random) -> Iterator[float]:
    together = BURST if settings.kind == "burst" else 1
    time = 0.0
    while True:
        for _ in range(together):
            yield time
        time += numbers.expovariate(settings.rate / together)


def _log_normal(numbers: random.Random, mean: int) -> int:
    return max(1, round(numbers.lognormvariate(math.log(mean) - LOG_SPREAD**2 / 2, LOG_SPREAD)))


def _pareto(numbers: random.Random, mean: int) -> int:
    limit = TAIL_LIMIT * mean
    return max(1, round(min(limit, _pareto_scale(mean, limit) * numbers.paretovariate(TAIL))))


@functools.cache
def _pareto_scale(mean: int, limit: int) -> float:
    """The least value of a Pareto distribution that has this mean when it is cut off at the limit.

    From E[min(X, limit)] = scale · (TAIL - (scale / limit)^(TAIL - 1)) / (TAIL - 1), by iteration.
    """
    scale = mean * (TAIL - 1) / TAIL
    for _ in range(64):
        scale = mean * (TAIL - 1) / (TAIL - (scale / limit) ** (TAIL - 1))
    return scale
