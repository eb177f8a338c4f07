"""Token-weighted fairness between tenants: Virtual Token Counters (Sheng et al. 2024, arXiv 2401.00588, section 4)."""

from __future__ import annotations

from kvarn.scheduler.policy import FirstComeFirstServed
from kvarn.scheduler.sequence import Sequence

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2
"""What a token counts: w_p and w_q of the paper."""
MAX_TENANTS = 1024
"""Tenants without waiting requests whose counters are remembered at most."""


class FairShare(FirstComeFirstServed):
    """The tenant that has had least service comes first; within a tenant in order of arrival.

    Each tenant has a counter of the service it got, in weighted tokens. One that comes back after a while without
    waiting requests is lifted to the least counter of those that wait, so that idleness earns no credit (the paper's
    algorithm 2); among equals it is first. Between two tenants that have requests waiting all the time, the service
    differs by at most 2 · max(w_p · L, w_q · M), L the longest prompt and M the tokens that the cache holds (theorem
    4.4), a prompt counted when it is complete.

    Only service is charged, not its repetition after preemption: so between two tokens that are sampled or prompts that
    are completed the order stands still but for arrivals, the first in it gets on, and all requests end.
    """

    name = "fair"

    def __init__(self, max_tenants: int = MAX_TENANTS) -> None:
        """max_tenants: see `MAX_TENANTS`."""
        self._max_tenants = max_tenants
        self._counters: dict[str, int] = {}
        self._open: set[str] = set()
        self._lifted: set[str] = set()
        """Those that were lifted and not charged for a prompt since."""
        self._last_closed = ""

    def lane(self, sequence: Sequence) -> str:
        """The tenant."""
        return sequence.request.tenant

    def rank(self, lane: str) -> float:
        """The tenant's counter, which is whole, and a half less for one that was lifted and not served since."""
        return self._counter(lane) - 0.5 * (lane in self._lifted)

    def open(self, lane: str) -> None:
        """Lifts the counter to the least of those that wait, or to that of the last that did."""
        level = self._level()
        if self._counters.get(lane, -1) < level:
            self._counters[lane] = level
            self._lifted.add(lane)
        self._open.add(lane)

    def close(self, lane: str) -> None:
        """The counter is kept, as long as there are not too many."""
        self._open.discard(lane)
        self._last_closed = lane
        if len(self._counters) > len(self._open) + 2 * self._max_tenants:
            self._forget()

    def charge_prompt(self, lane: str, tokens: int) -> None:
        """Adds the weighted tokens to the tenant's counter."""
        self._counters[lane] = self._counter(lane) + PROMPT_WEIGHT * tokens
        self._lifted.discard(lane)

    def charge_output(self, lane: str) -> None:
        """Adds a weighted token to the tenant's counter."""
        self._counters[lane] = self._counter(lane) + OUTPUT_WEIGHT

    def price(self, sequence: Sequence) -> float:
        """The weighted tokens of its prompt."""
        return PROMPT_WEIGHT * sequence.num_prompt_tokens

    @property
    def num_tenants(self) -> int:
        """Counters that are remembered."""
        return len(self._counters)

    def _counter(self, lane: str) -> int:
        """One that is not remembered stands where it would be lifted to."""
        counter = self._counters.get(lane)
        return self._level() if counter is None else counter

    def _level(self) -> int:
        if self._open:
            return min(self._counters[lane] for lane in self._open)
        return self._counters.get(self._last_closed, 0)

    def _forget(self) -> None:
        """Keeps the largest of the counters of tenants that do not wait.

        What is lost with one is how far it is above the level that it would be lifted to: nothing for most.
        """
        closed = sorted(self._counters.keys() - self._open - {self._last_closed}, key=self._counters.__getitem__)
        for lane in closed[: -self._max_tenants]:
            del self._counters[lane]
        self._lifted &= self._counters.keys()
