"""`AutoSpeculation`: as many guesses as bring most tokens a second, by what was right and what rows cost lately."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

from kvarn.request import Request
from kvarn.scheduler.acceptance import PRIOR_WEIGHT, Acceptance, kind_of
from kvarn.scheduler.account import Account
from kvarn.scheduler.cost import StepCost, StepShape
from kvarn.scheduler.sequence import Sequence
from kvarn.scheduler.speculation import check_asked, limit

MARGIN = 1.05
"""By how much guessing must be expected to pay: estimates err."""
LEAST_GAIN = 0.05
"""Guesses that are right less often are not considered."""
PATIENCE, LONGEST_REST = 4, 8
"""After so many choices in a row against guesses none are asked for in 1 step, then 2, 4, … and so many at most."""
PROBE_EVERY = 8
"""Of the choices against guesses that would pay if rows cost half as much as is believed, one is to try them."""
PLAIN_EVERY = 64
"""Of the choices, one is for no guesses: to measure what they are compared with."""
THIN, THIN_EVERY = 1.2, 8
"""Where guesses are expected to bring less than this times as many tokens a second, so often: how fast a machine is
changes within seconds, by more than they bring."""
FIRST, LATER = 0.5, 0.8
"""Probabilities that guesses are right, as long as none was seen."""
COMMON_MEMORY = 0.99
"""Of what is known of all sequences, from which a new one starts."""
SHARE = 0.1
"""Of each new measurement in the average for its number of rows, at least."""
EXACT_ROWS, ROWS_TOGETHER = 8, 4
"""Up to the first each number of rows has an average of its own; beyond it so many numbers share one."""
EAGER, ANEW_EVERY = 32, 16
"""Steps up to which all corrections follow each change of the model, and of the later ones one in so many."""
CLIP = 2.0
"""A step that took more than this many times the average (the machine was busy elsewhere) counts as this much."""


@dataclass(slots=True)
class _Steps:
    """Averages of steps of about as many rows, those of late."""

    seconds: float
    rows: float
    sequences: float
    attended: float
    context: float
    count: int = 1

    def take(self, shape: StepShape, seconds: float) -> None:
        """One more."""
        self.count += 1
        share = max(SHARE, 1 / self.count)
        self.seconds += share * (seconds - self.seconds)
        self.rows += share * (shape.num_tokens - self.rows)
        self.sequences += share * (shape.num_sequences - self.sequences)
        self.attended += share * (shape.num_attended - self.attended)
        self.context += share * (shape.num_context - self.context)

    def ratio(self, cost: StepCost) -> float:
        """What they took against what is predicted now."""
        rows = round(self.rows)
        shape = StepShape(rows, round(self.sequences), rows, round(self.attended), round(self.context))
        return self.seconds / cost.seconds(shape)


class RowTimes:
    """Predicts steps of decodes and drafts: a model of all steps, corrected by what steps of as many rows took lately.

    A few rows cost little more than one, and not in a straight line, since weights are read and unpacked for several
    rows at once. Between numbers of rows that were measured the correction is interpolated. It is against what the
    model says now, so that it stays right when the model changes.
    """

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._rows: list[int] = []
        self._steps: list[_Steps] = []
        self._ratios: list[float] = []
        self._observed = 0

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Takes a measured step in, if no prompt was computed in it."""
        if not is_decoding(shape) or seconds <= 0:
            return
        rows = _group(shape.num_tokens)
        place = bisect.bisect_left(self._rows, rows)
        if place == len(self._rows) or self._rows[place] != rows:
            self._rows.insert(place, rows)
            averages = (float(shape.num_tokens), float(shape.num_sequences), float(shape.num_attended))
            self._steps.insert(place, _Steps(seconds, *averages, float(shape.num_context)))
            self._ratios.insert(place, 1.0)
        else:
            self._steps[place].take(shape, min(seconds, CLIP * self._ratios[place] * self._cost.seconds(shape)))
        self._observed += 1
        if self._observed < EAGER or self._observed % ANEW_EVERY == 0:
            self._ratios = [steps.ratio(self._cost) for steps in self._steps]
        else:
            self._ratios[place] = self._steps[place].ratio(self._cost)

    def knows(self, rows: int) -> bool:
        """Whether steps of so many rows were measured."""
        rows = _group(rows)
        place = bisect.bisect_left(self._rows, rows)
        return place < len(self._rows) and self._rows[place] == rows

    def seconds(self, shape: StepShape, length: int, most: int, every: int = 1) -> list[float]:
        """Expected wall times of the step with 0, `every`, … `most` rows more, in seconds. length: where those stand in
        their sequences, about. Between none and all of them the model is taken to be a straight line."""
        first = self._cost.seconds(shape)
        slope = (self._cost.seconds(shape.drafted(length, most)) - first) / most if most else 0.0
        rows = shape.num_tokens
        return [(first + slope * more) * self._ratio(rows + more) for more in range(0, most + 1, every)]

    def _ratio(self, rows: int) -> float:
        ratios = self._ratios
        if not ratios:
            return 1.0
        rows = _group(rows)
        place = bisect.bisect_left(self._rows, rows)
        if place == len(ratios):
            return ratios[-1]
        if place == 0 or self._rows[place] == rows:
            return ratios[place]
        below, above = self._rows[place - 1], self._rows[place]
        share = (rows - below) / (above - below)
        return ratios[place - 1] + share * (ratios[place] - ratios[place - 1])


def is_decoding(shape: StepShape) -> bool:
    """Whether no prompt is computed in the step."""
    return shape.num_tokens == shape.num_sampled > 0


def plain_shape(shape: StepShape) -> StepShape:
    """Of a step of decodes and their drafts the decodes alone, nearly: guesses are few beside what is known."""
    count = shape.num_sequences
    attended = shape.num_attended * count // shape.num_tokens
    return StepShape(count, count, count, attended, shape.num_context - (shape.num_tokens - count))


def _group(rows: int) -> int:
    """The number of rows under which this one is measured."""
    return rows if rows <= EXACT_ROWS else -(-rows // ROWS_TOGETHER) * ROWS_TOGETHER


class AutoSpeculation:
    """Chooses for each step the guesses to verify that make its tokens a second the most; none where that is best.

    Each sequence of the step brings one token, and each guess of it the probability that all guesses up to it are right
    (`Acceptance`). Guesses are taken by that, the likeliest first, whosever they are, and as many as make the quotient
    of expected tokens and expected time largest: so a busy batch, in which each row costs, stops guessing by itself.

    What was right is learned from every draft that was proposed, verified or not, since the tokens come in any case;
    apart for drafts of different length, since a drafter that is surer proposes more.
    What rows cost is learned from steps that have them; where it is believed to be too much, they are tried now and
    then to measure it anew. Where guesses do not pay, they are asked for in some of the steps only.
    What it believes may be wrong: it keeps an `Account` of what really came, and as long as that is overdrawn there are
    steps without guesses only.
    """

    num_accounts = 1
    """Sources of guesses, of which each has one."""

    def __init__(self, most: int, cost: StepCost) -> None:
        """most: guesses for a sequence at most. cost: predicts steps, as a start."""
        self.most = most
        self._times = RowTimes(cost)
        self._accounts = [Account(1 / self.num_accounts) for _ in range(self.num_accounts)]
        self._account = self._accounts[0]
        self._said = 0
        """Tokens of the step that is being booked."""
        self._aside = 0.0
        """Seconds that guessing took in it."""
        self._common: dict[int, Acceptance] = {}
        """By kind of draft."""
        self._thin = False
        """Whether the guesses that were chosen last are expected to bring little."""
        self._choices = self._refusals = 0
        self._steps = self._awake = self._against = 0

    def check(self, request: Request) -> None:
        """See `Speculation`."""
        check_asked(request, self.most)

    def wanted(self, sequence: Sequence) -> int:
        """All that it may have: whether they are verified is decided when they are known. None during a rest."""
        return 0 if self._steps < self._awake else limit(self.most, sequence)

    def copies(self, sequence: Sequence) -> tuple[int, int]:
        """None: there is one source of guesses."""
        del sequence
        return 0, 0

    def least_sure(self, sequence: Sequence) -> tuple[float, float]:
        """None: guesses cost nothing until they are verified."""
        del sequence
        return 0.0, 0.0

    def choose(self, drafted: ListOf[Sequence], shape: StepShape, room: int) -> list[int]:
        """See `Speculation`."""
        self._choices += 1
        if self._is_plain(self._choices) or not self._times.knows(shape.num_tokens):
            return [0] * len(drafted)
        return self._best(drafted, shape, room, self._account)

    def _best(self, drafted: ListOf[Sequence], shape: StepShape, room: int, account: Account) -> list[int]:
        """As many as are believed to pay, or are to be tried, if the account is not overdrawn."""
        if account.seconds < 0:
            return [0] * len(drafted)
        order, gains = self._likeliest(drafted, room)
        length = sum(s.num_tokens for s in drafted) // len(drafted)
        times = self._times.seconds(shape, length, len(order))
        count = best_count(shape.num_sequences, gains, times)
        if count:
            self._note_gain((1 + sum(gains[:count]) / shape.num_sequences) * times[0] / times[count])
        self._against = 0 if count else self._against + 1
        if self._against >= PATIENCE:
            self._awake = self._steps + min(LONGEST_REST, 1 << min(self._against - PATIENCE, 30))
        if not count:
            count = self._probe(shape.num_sequences, gains, [0.5 * (times[0] + seconds) for seconds in times])
        counts = [0] * len(drafted)
        for place in order[:count]:
            counts[place] += 1
        return counts

    def _is_plain(self, number: int) -> bool:
        """Whether that choice is for no guesses."""
        return number % (THIN_EVERY if self._thin else PLAIN_EVERY) == 0

    def _note_gain(self, gain: float) -> None:
        """Guesses are expected to bring so many times as many tokens a second."""
        self._thin = gain < THIN

    def plan(self, ready: ListOf[Sequence], shape: StepShape) -> None:
        """There is nothing to plan: guesses cost nothing until they are verified."""

    def proposed(self, came: ListOf[tuple[int, int]], seconds: float, prepare_seconds: float) -> None:
        """Guesses that cost nothing teach nothing of what they cost."""

    def ended(self, sequence: Sequence) -> None:
        """Learns nothing."""

    def compare(
        self, sequence: Sequence, draft: tuple[int, ...], parents: tuple[int, ...], tokens: ListOf[int]
    ) -> None:
        """See `Speculation`."""
        self._said += len(tokens)
        if draft:
            kind = self._kind(sequence, draft)
            for known in (self._known(sequence, kind), self._of_all(kind)):
                known.compare(draft, tokens, parents)

    def timed(self, shape: StepShape, seconds: float) -> None:
        """See `Speculation`."""
        self._steps += 1
        if is_decoding(shape):
            self._balance(shape, seconds)
        self._times.observe(shape, seconds)
        self._said, self._aside = 0, 0.0

    def _balance(self, shape: StepShape, seconds: float) -> None:
        """Takes a step into the account."""
        count, extra = shape.num_sequences, shape.num_tokens - shape.num_sequences
        expected = self._times.seconds(plain_shape(shape), shape.num_context // count, extra, max(1, extra))
        if extra or self._aside:
            spent = min(seconds, CLIP * expected[-1]) + self._aside
            self._booked_to().saved(expected[0] * self._said / count - spent)
        for account in self._accounts:
            account.stepped(seconds, expected[0])

    def _booked_to(self) -> Account:
        """The account of the guesses of this step."""
        return self._account

    def _kind(self, sequence: Sequence, draft: tuple[int, ...]) -> int:
        """Of a draft of the sequence, the one that it has."""
        del sequence
        return kind_of(draft)

    def _weight(self, kind: int) -> float:
        """Guesses of a sequence that what is known of all counts for."""
        del kind
        return PRIOR_WEIGHT

    def _of_all(self, kind: int) -> Acceptance:
        """What is known of all sequences' drafts of that kind."""
        if kind not in self._common:
            self._common[kind] = self._prior(kind)
        return self._common[kind]

    def _prior(self, kind: int) -> Acceptance:
        """What is believed of drafts of that kind as long as none was seen."""
        del kind
        return Acceptance.prior(FIRST, LATER, COMMON_MEMORY)

    def _known(self, sequence: Sequence, kind: int) -> Acceptance:
        """What is known of the sequence's."""
        known = sequence.acceptance.get(kind)
        if known is None:
            known = sequence.acceptance[kind] = self._of_all(kind).start(self._weight(kind))
        return known

    def _likeliest(self, drafted: ListOf[Sequence], room: int) -> tuple[list[int], list[float]]:
        """The guesses of all drafts, the likeliest first, `room` at most: whose each is, and what it brings.

        Of a draft they are in its order. One that makes way for likelier ones is taken where those are.
        """
        of = [self._known(s, self._kind(s, s.draft)).gains(s.parents) for s in drafted]
        worth = [_worth(gains) for gains in of]
        heap = [(-values[0], place, 0) for place, values in enumerate(worth)]
        heapq.heapify(heap)
        order: list[int] = []
        gains: list[float] = []
        while heap and len(order) < room and -heap[0][0] >= LEAST_GAIN:
            _, place, guess = heapq.heappop(heap)
            order.append(place)
            gains.append(of[place][guess])
            if guess + 1 < len(of[place]):
                heapq.heappush(heap, (-worth[place][guess + 1], place, guess + 1))
        return order, gains

    def _probe(self, tokens: int, gains: list[float], times: list[float]) -> int:
        """How many guesses to verify in order to learn what they cost; mostly none."""
        count = best_count(tokens, gains, times)
        if not count:
            return 0
        self._refusals += 1
        return count if self._refusals % PROBE_EVERY == 0 else 0


def _worth(gains: list[float]) -> list[float]:
    """What each of some guesses is worth, of which the first so many may be had: its own gain, or the mean of it and
    its neighbours where later ones bring more. Never more than the one before. (Sidney 1975, "Decomposition algorithms
    for single-machine sequencing with precedence relations", for chains.)"""
    blocks: list[tuple[float, int]] = []
    for gain in gains:
        total, count = gain, 1
        while blocks and total * blocks[-1][1] > blocks[-1][0] * count:
            before, more = blocks.pop()
            total, count = total + before, count + more
        blocks.append((total, count))
    return [total / count for total, count in blocks for _ in range(count)]


def best_count(tokens: int, gains: list[float], times: list[float]) -> int:
    """How many guesses make expected tokens by expected seconds largest; 0 unless that beats none by `MARGIN`.

    tokens: that come in any case. times: seconds of the step with 0, 1, 2, … guesses.
    """
    best, count, expected = MARGIN * tokens / times[0], 0, float(tokens)
    for rows, gain in enumerate(gains, 1):
        expected += gain
        speed = expected / times[rows]
        if speed > best:
            best, count = speed, rows
    return count
