"""What a simulated run is judged by: rates, waiting times, hits, preemptions, and how even tenants were served."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn.scheduler import Scheduler
from kvarn.scheduler import Sequence as ScheduledStream
from kvarn.simulate.settings import Settings
from kvarn.step import SchedulerOutput
from kvarn.traffic import Arrival

PERCENTILES = (50, 95, 99)
FAIRNESS_WINDOW = 10.0
"""Seconds over which the service of tenants is compared."""


@dataclass(frozen=True, slots=True)
class Fairness:
    """How even the tenants that had requests in flight all the time were served, in windows of 10 seconds."""

    jain: float
    """Mean over windows of Jain's index (Jain et al. 1984) of served tokens: 1 is even, 1/n one tenant has all."""
    max_to_min: float
    """Tokens of the tenant that got most, in these windows, to those of the one that got least; inf: it got none."""
    windows: int


@dataclass(frozen=True, slots=True)
class Results:
    """One run. Times in seconds; percentiles by their number, None where there was nothing to take them of."""

    settings: Settings
    requests: int
    finished: int
    refused: int
    """They fit neither the cache nor the length, the queue was full, or they were late."""
    late: int
    """Those of the refused whose first token was not to be expected in time."""
    duration: float
    """From the first arrival to the last token."""
    steps: int
    prompt_tokens: int
    """Of the finished requests."""
    output_tokens: int
    tokens_per_s: float
    """Output tokens of the finished requests, over the duration."""
    total_tokens_per_s: float
    """Prompt tokens among them."""
    ttft: Mapping[int, float] | None
    itl: Mapping[int, float] | None
    e2e: Mapping[int, float] | None
    hit_rate: float
    """Share of the prompts' tokens that were found in the prefix cache."""
    preemptions: int
    recomputed_tokens: int
    """Tokens that were computed again after a preemption."""
    saved_tokens: int
    """Tokens whose KV was saved to the second tier."""
    loaded_tokens: int
    """Tokens whose KV was loaded from it."""
    utilization: float
    """Share of the duration in which a step ran."""
    mean_batch: float
    """Sequences in a step, averaged over time."""
    fairness: Fairness | None
    """None where there were no two tenants with requests in flight at the same time."""
    tenants: Mapping[str, Mapping[str, float]]
    """By tenant: finished, output_tokens, ttft_p50, ttft_p99. Empty where there is only one."""


class Recorder:
    """Keeps what `Results` is made of while a run goes on."""

    def __init__(self, traffic: Sequence[Arrival], settings: Settings) -> None:
        count = len(traffic)
        self.num_ended = 0
        self._traffic = traffic
        self._settings = settings
        self._first: NDArray[np.float64] = np.full(count, np.nan)
        self._end: NDArray[np.float64] = np.full(count, np.nan)
        self._cached: NDArray[np.int64] = np.zeros(count, np.int64)
        self._indexes: dict[int, int] = {}
        self._last: dict[int, float] = {}
        self._gaps, self._gap_counts = array("d"), array("q")
        self._num_refused = 0
        self._num_late = 0
        self._steps = 0
        self._busy = 0.0
        self._sequence_seconds = 0.0
        self._recomputed = 0
        self._reached: dict[int, int] = {}
        """How many tokens of each sequence have been computed at most."""
        tenants = {arrival.tenant for arrival in traffic}
        self._shares = _Shares() if len(tenants) > 1 else None

    def refused(self, *, late: bool) -> None:
        """A request was not taken. late: for its deadline."""
        self._num_refused += 1
        self._num_late += late
        self.num_ended += 1

    def added(self, index: int, sequence_id: int) -> None:
        """A request is in the scheduler's queue."""
        self._indexes[sequence_id] = index
        if self._shares is not None:
            self._shares.begin(self._traffic[index].tenant)

    def stepped(self, scheduled: SchedulerOutput, seconds: float, now: float) -> None:
        """A step was booked that ended `now`."""
        self.ran(1, len(scheduled.sequences), seconds)
        for part in scheduled.sequences:
            reached = self._reached.get(part.sequence_id, 0)
            self._recomputed += max(0, min(part.end, reached) - part.start)
            self._reached[part.sequence_id] = max(part.end, reached)
        if self._shares is not None:
            for part in scheduled.sequences:
                self._shares.serve(self._traffic[self._indexes[part.sequence_id]].tenant, len(part.token_ids))
            self._shares.advance(now)

    def ran(self, steps: int, sequences: int, seconds: float) -> None:
        """Steps of so many sequences each; seconds in all."""
        self._steps += steps
        self._busy += seconds
        self._sequence_seconds += seconds * sequences

    def skipped(self, steps: int, sequence_ids: Iterable[int], seconds: float, now: float) -> None:
        """Steps were booked in which each of the sequences got a token; the last ended `now`. Not their gaps."""
        ids = list(sequence_ids)
        self.ran(steps, len(ids), seconds)
        self._last.update(dict.fromkeys(ids, now))
        for sequence_id in ids:
            self._reached[sequence_id] += steps
        if self._shares is not None:
            for sequence_id in ids:
                self._shares.serve(self._traffic[self._indexes[sequence_id]].tenant, steps)
            self._shares.advance(now)

    @property
    def next_window(self) -> float:
        """When the service of tenants is looked at next."""
        return math.inf if self._shares is None else self._shares.until

    def gaps(self, sequence_ids: Iterable[int], now: float) -> None:
        """Each of the sequences got a token `now`."""
        for sequence_id in sequence_ids:
            self.gap(now - self._last[sequence_id], 1)

    def gap(self, seconds: float, count: int) -> None:
        """So many tokens came so long after the one before them."""
        self._gaps.append(seconds)
        self._gap_counts.append(count)

    def sampled(self, sequence: ScheduledStream, now: float) -> None:
        """A sequence got a token."""
        sequence_id = sequence.sequence_id
        last = self._last.get(sequence_id)
        if last is None:
            index = self._indexes[sequence_id]
            self._first[index] = now
            self._cached[index] = sequence.num_cached_tokens
        else:
            self.gap(now - last, 1)
        self._last[sequence_id] = now
        if sequence.finished:
            self._ended(sequence_id, now)

    def _ended(self, sequence_id: int, now: float) -> None:
        index = self._indexes.pop(sequence_id)
        del self._last[sequence_id], self._reached[sequence_id]
        self._end[index] = now
        self.num_ended += 1
        if self._shares is not None:
            self._shares.end(self._traffic[index].tenant)

    def results(self, now: float, scheduler: Scheduler) -> Results:
        """The run as a whole; `now` is its end."""
        traffic = self._traffic
        done = ~np.isnan(self._end)
        arrived = np.array([arrival.time for arrival in traffic])
        prompts = np.array([arrival.prompt_tokens for arrival in traffic])
        outputs = np.array([arrival.output_tokens for arrival in traffic])
        duration = float(np.nanmax(self._end)) - float(arrived[0]) if done.any() else now
        prompt_tokens, output_tokens = int(prompts[done].sum()), int(outputs[done].sum())
        cached = int(self._cached[done].sum())
        return Results(
            settings=self._settings,
            requests=len(traffic),
            finished=int(done.sum()),
            refused=self._num_refused,
            late=self._num_late,
            duration=duration,
            steps=self._steps,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            tokens_per_s=_rate(output_tokens, duration),
            total_tokens_per_s=_rate(prompt_tokens + output_tokens, duration),
            ttft=percentiles((self._first - arrived)[done]),
            itl=percentiles(np.frombuffer(self._gaps), np.frombuffer(self._gap_counts, np.int64)),
            e2e=percentiles((self._end - arrived)[done]),
            hit_rate=cached / prompt_tokens if prompt_tokens else 0.0,
            preemptions=scheduler.num_preemptions,
            recomputed_tokens=self._recomputed,
            saved_tokens=scheduler.reuse.num_saved_tokens,
            loaded_tokens=scheduler.reuse.num_loaded_tokens,
            utilization=_rate(self._busy, duration),
            mean_batch=_rate(self._sequence_seconds, self._busy),
            fairness=None if self._shares is None else self._shares.fairness(),
            tenants=self._by_tenant(done, self._first - arrived, outputs),
        )

    def _by_tenant(
        self, done: NDArray[np.bool_], ttft: NDArray[np.float64], outputs: NDArray[np.int64]
    ) -> dict[str, dict[str, float]]:
        names = np.array([arrival.tenant for arrival in self._traffic])
        if self._shares is None:
            return {}
        groups = {str(name): done & (names == name) for name in np.unique(names)}
        return {
            name: {
                "finished": int(chosen.sum()),
                "output_tokens": int(outputs[chosen].sum()),
                "ttft_p50": float(np.percentile(ttft[chosen], 50)),
                "ttft_p99": float(np.percentile(ttft[chosen], 99)),
            }
            for name, chosen in groups.items()
            if chosen.any()
        }


def percentiles(values: NDArray[np.float64], counts: NDArray[np.int64] | None = None) -> dict[int, float] | None:
    """The least value that a share of all values does not exceed, by per cent. counts: how often each is there."""
    if not values.size:
        return None
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    upto = np.arange(1, values.size + 1) if counts is None else np.cumsum(counts[order])
    places = np.searchsorted(upto, [share / 100 * upto[-1] for share in PERCENTILES])
    found = (float(ordered[min(place, values.size - 1)]) for place in places)
    return dict(zip(PERCENTILES, found, strict=True))


def jain(shares: Sequence[float]) -> float:
    """(Σx)² / (n · Σx²); 1 where all are 0."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


class _Shares:
    """Tokens that each tenant got in each window, and who had requests in flight all through it."""

    def __init__(self) -> None:
        self._in_flight: defaultdict[str, int] = defaultdict(int)
        self._served: defaultdict[str, int] = defaultdict(int)
        self._throughout: set[str] = set()
        self.until = FAIRNESS_WINDOW
        self._totals: defaultdict[str, int] = defaultdict(int)
        self._indexes: list[float] = []

    def begin(self, tenant: str) -> None:
        self._in_flight[tenant] += 1

    def end(self, tenant: str) -> None:
        self._in_flight[tenant] -= 1
        if not self._in_flight[tenant]:
            del self._in_flight[tenant]
            self._throughout.discard(tenant)

    def serve(self, tenant: str, tokens: int) -> None:
        self._served[tenant] += tokens

    def advance(self, now: float) -> None:
        if now < self.until:
            return
        if len(self._throughout) > 1:
            shares = {tenant: self._served[tenant] for tenant in self._throughout}
            self._indexes.append(jain(list(shares.values())))
            for tenant, tokens in shares.items():
                self._totals[tenant] += tokens
        self._served.clear()
        self._throughout = set(self._in_flight)
        self.until = now + FAIRNESS_WINDOW

    def fairness(self) -> Fairness | None:
        if not self._indexes:
            return None
        most, least = max(self._totals.values()), min(self._totals.values())
        ratio = most / least if least else float("inf")
        return Fairness(sum(self._indexes) / len(self._indexes), ratio, len(self._indexes))


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
