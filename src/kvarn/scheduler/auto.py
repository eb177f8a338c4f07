"""`AutoSpeculation`: as many guesses as bring most tokens a second, by what was right and what rows cost lately."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable
from collections.abc import Sequence as ListOf

from kvarn.request import Request
from kvarn.scheduler.acceptance import Acceptance
from kvarn.scheduler.cost import StepCost, StepShape
from kvarn.scheduler.sequence import Sequence
from kvarn.scheduler.speculation import check_asked, limit

MARGIN = 1.03
"""By how much guessing must be expected to pay: estimates err."""
PROBE_EVERY = 32
"""Of the steps in which guesses would pay if rows cost half as much as is believed, one tries them."""
PLAIN_EVERY = 64
"""Of the steps in which guesses could be verified, one has none: to measure what they are compared with."""
FIRST, LATER = 0.5, 0.8
"""Probabilities that guesses are right, as long as none was seen."""
COMMON_MEMORY = 0.99
"""Of what is known of all sequences, from which a new one starts."""
SHARE = 0.1
"""Of each new measurement in the average for its number of rows."""
CLIP = 2.0
"""A step that took more than this many times the average (the machine was busy elsewhere) counts as this much."""


class RowTimes:
    """Predicts steps of decodes and drafts: a model of all steps, corrected by what steps of as many rows took lately.

    A few rows cost little more than one, and not in a straight line, since weights are read and unpacked for several
    rows at once. Between numbers of rows that were measured the correction is interpolated.
    """

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._rows: list[int] = []
        self._ratios: list[float] = []

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Takes a measured step in, if no prompt was computed in it."""
        if shape.num_tokens != shape.num_sampled or not shape.num_tokens or seconds <= 0:
            return
        ratio = seconds / self._cost.seconds(shape)
        place = bisect.bisect_left(self._rows, shape.num_tokens)
        if place == len(self._rows) or self._rows[place] != shape.num_tokens:
            self._rows.insert(place, shape.num_tokens)
            self._ratios.insert(place, ratio)
            return
        known = self._ratios[place]
        self._ratios[place] = known + SHARE * (min(ratio, CLIP * known) - known)

    def knows(self, rows: int) -> bool:
        """Whether steps of so many rows were measured."""
        place = bisect.bisect_left(self._rows, rows)
        return place < len(self._rows) and self._rows[place] == rows

    def seconds(self, shape: StepShape) -> float:
        """Expected wall time of a step, in seconds."""
        return self._cost.seconds(shape) * self._ratio(shape.num_tokens)

    def _ratio(self, rows: int) -> float:
        if not self._rows:
            return 1.0
        place = bisect.bisect_left(self._rows, rows)
        if place == len(self._rows):
            return self._ratios[-1]
        if place == 0 or self._rows[place] == rows:
            return self._ratios[place]
        below, above = self._rows[place - 1], self._rows[place]
        share = (rows - below) / (above - below)
        return self._ratios[place - 1] + share * (self._ratios[place] - self._ratios[place - 1])


class AutoSpeculation:
    """Chooses for each step the guesses to verify that make its tokens a second the most; none where that is best.

    Each sequence of the step brings one token, and each guess of it the probability that all guesses up to it are right
    (`Acceptance`). Guesses are taken by that, the likeliest first, whosever they are, and as many as make the quotient
    of expected tokens and expected time largest: so a busy batch, in which each row costs, stops guessing by itself.

    What was right is learned from every draft that was proposed, verified or not, since the tokens come in any case.
    What rows cost is learned from steps that have them; where it is believed to be too much, they are tried now and
    then to measure it anew.
    """

    def __init__(self, most: int, cost: StepCost) -> None:
        """most: guesses for a sequence at most. cost: predicts steps, as a start."""
        self.most = most
        self._times = RowTimes(cost)
        self._common = Acceptance.prior(FIRST, LATER, COMMON_MEMORY)
        self._choices = self._refusals = 0

    def check(self, request: Request) -> None:
        """See `Speculation`."""
        check_asked(request, self.most)

    def wanted(self, sequence: Sequence) -> int:
        """All that it may have: whether they are verified is decided when they are known."""
        return limit(self.most, sequence)

    def choose(self, drafted: ListOf[Sequence], shape: StepShape, room: int) -> list[int]:
        """See `Speculation`."""
        self._choices += 1
        if self._choices % PLAIN_EVERY == 0 or not self._times.knows(shape.num_tokens):
            return [0] * len(drafted)
        order, gains = self._likeliest(drafted, room)
        length = sum(s.num_tokens for s in drafted) // len(drafted)
        base = self._times.seconds(shape)
        more = [self._times.seconds(shape.drafted(length, count + 1)) - base for count in range(len(order))]
        count = _best(shape.num_sequences, gains, base, lambda rows: more[rows - 1])
        if not count:
            count = self._probe(shape.num_sequences, gains, base, lambda rows: 0.5 * more[rows - 1])
        counts = [0] * len(drafted)
        for place in order[:count]:
            counts[place] += 1
        return counts

    def compare(self, sequence: Sequence, draft: tuple[int, ...], tokens: ListOf[int]) -> None:
        """See `Speculation`."""
        if draft:
            self._of(sequence).compare(draft, tokens)
            self._common.compare(draft, tokens)

    def timed(self, shape: StepShape, seconds: float) -> None:
        """See `Speculation`."""
        self._times.observe(shape, seconds)

    def _of(self, sequence: Sequence) -> Acceptance:
        if sequence.acceptance is None:
            sequence.acceptance = Acceptance.prior(self._common.first.mean, self._common.later.mean)
        return sequence.acceptance

    def _likeliest(self, drafted: ListOf[Sequence], room: int) -> tuple[list[int], list[float]]:
        """The guesses of all drafts, the likeliest first, `room` at most: whose each is, and what it brings."""
        rates = [self._of(sequence) for sequence in drafted]
        heap = [(-rate.gain(0), place, 0) for place, rate in enumerate(rates)]
        heapq.heapify(heap)
        order: list[int] = []
        gains: list[float] = []
        while heap and len(order) < room:
            gain, place, guess = heapq.heappop(heap)
            order.append(place)
            gains.append(-gain)
            if guess + 1 < len(drafted[place].draft):
                heapq.heappush(heap, (-rates[place].gain(guess + 1), place, guess + 1))
        return order, gains

    def _probe(self, tokens: int, gains: list[float], base: float, more: Callable[[int], float]) -> int:
        """How many guesses to verify in order to learn what they cost; mostly none."""
        count = _best(tokens, gains, base, more)
        if not count:
            return 0
        self._refusals += 1
        return count if self._refusals % PROBE_EVERY == 0 else 0


def _best(tokens: int, gains: list[float], base: float, more: Callable[[int], float]) -> int:
    """How many guesses make expected tokens by expected seconds largest; 0 unless that beats none by `MARGIN`.

    tokens: that come in any case. base: seconds without guesses. more: seconds on top, for 1, 2, … guesses.
    """
    best, count, expected = MARGIN * tokens / base, 0, float(tokens)
    for rows, gain in enumerate(gains, 1):
        expected += gain
        speed = expected / (base + more(rows))
        if speed > best:
            best, count = speed, rows
    return count
