"""`TokenBucket`: a rate, held over every stretch of time but for one minute's worth at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class Taken(NamedTuple):
    """What was taken of a bucket for a cost that is not known yet."""

    bucket: TokenBucket
    amount: float
    overflow: float
    """Of the bucket, when it was taken."""


class TokenBucket:
    """The token bucket of RFC 2215, section 3.6: in any time T at most r T + b, here with b one minute of r.

    A cost may be estimated: `take` the most it can be, and `settle` what it was. What is given back is only what would
    still be there had the true cost been taken at once, so that the bound holds for true costs by the time they were
    taken for: while more than necessary was out, the bucket may have overflowed where it would have stayed full.
    `_high` follows the bucket from which nothing was taken ahead, and counts what runs over. A cost that exceeds its
    estimate leaves the bucket below nothing, until time has made up for it.

    Not thread-safe.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        """A full one. clock: in seconds."""
        self._clock = clock
        self._at = clock()
        self.capacity = float(per_minute)
        self._level = self._high = self.capacity
        self._overflow = 0.0

    def retune(self, per_minute: float) -> None:
        """Another rate from now on; what is spent stays spent."""
        self._refill()
        self.capacity = float(per_minute)
        self._level, self._high = min(self._level, self.capacity), min(self._high, self.capacity)

    def _refill(self) -> None:
        now = max(self._clock(), self._at)
        gained = (now - self._at) * self.capacity / 60
        self._at = now
        self._level = min(self._level + gained, self.capacity)
        self._high += gained
        if self._high > self.capacity:
            self._overflow += self._high - self.capacity
            self._high = self.capacity

    @property
    def level(self) -> float:
        """What can be taken now; below 0 where more was used than was taken."""
        self._refill()
        return self._level

    def seconds_until(self, amount: float) -> float:
        """When that much can be taken, if nobody else takes anything; endless beyond the capacity."""
        missing = amount - self.level
        if amount > self.capacity:
            return float("inf")
        return max(0.0, missing * 60 / self.capacity)

    def take(self, amount: float) -> Taken | None:
        """Takes it; None, and nothing is taken, where there is not enough."""
        if amount > self.level:
            return None
        self._level -= amount
        return Taken(self, amount, self._overflow)

    def settle(self, taken: Taken, used: float) -> None:
        """Told what was used, in the end, of what this bucket gave. Once for each."""
        self._refill()
        if used > taken.amount:
            self._level -= used - taken.amount
        else:
            lost = self._overflow - taken.overflow
            self._level = min(self._level + max(0.0, taken.amount - used - lost), self.capacity)
        self._high = max(self._level, self._high - used)
