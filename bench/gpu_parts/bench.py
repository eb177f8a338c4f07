"""What every part is given."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_parts.limits import Limits
from gpu_parts.results import Results, Row
from gpu_parts.shapes import Sizes
from kvarn.backends.cuda.clock import Clock


@dataclass(frozen=True, slots=True)
class Bench:
    """Where results go, how time is taken, how large things are, and what the card can do at most."""

    results: Results
    clock: Clock
    sizes: Sizes
    limits: Limits

    def add(self, row: Row) -> None:
        """One more row of the table."""
        self.results.add(row)

    @property
    def device(self) -> str:
        """As torch names it."""
        return str(self.clock.device)

    def is_first(self, model: str) -> bool:
        """Whether bounds are given for that model."""
        return model == next(iter(self.sizes.models))
