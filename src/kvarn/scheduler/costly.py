"""`CostlySpeculation`: as many guesses as pay where making them takes time, too, as with a draft model."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

from kvarn.scheduler.acceptance import Acceptance
from kvarn.scheduler.auto import (
    COMMON_MEMORY,
    LATER,
    LEAST_GAIN,
    LONGEST_REST,
    AutoSpeculation,
    best_count,
    margin,
)
from kvarn.scheduler.cost import StepCost, StepShape
from kvarn.scheduler.sequence import Sequence
from kvarn.scheduler.speculation import limit

FIRST_COMPUTED = 0.7
"""Probability that a first guess is right, as long as none was seen: what is asked for a guess has been thought of."""
PRIOR_SHARE = 0.3
"""What a guess of each sequence is believed to take of a step without guesses, as long as none was measured."""
LAST = 5
"""Measurements of which the median counts, for each number of sequences: some have texts to read first."""
LEAST_TRIED = 8
"""Guesses that are tried at first, where none are believed to pay, whatever one takes, if there is time to read."""
TRY_EVERY = 20
"""Steps from one that is tried to the next, then, however little it takes."""
DEEPER_EVERY = 4
"""Of the steps with guesses, one has one more of them than is believed best, as long as that was never measured."""
NEARLY = 8
"""Tokens that a drafter may lack of a text without it being worth a thought."""
READING_MARGIN = 1.5
"""By how much reading must be expected to pay."""
READING_MEMORY, LEAST_OFF, UNKNOWN_OFF = 0.8, 0.1, 1.5
"""What is known of the time of reading counts this much less with each text; and a bound of what it may say."""
ANSWERED_SHARE, GOING_ON_SHARE = 0.05, 0.02
"""Of each step in the share of sequences that guesses came for, and of each guess in the share that others follow."""
SUREST = 0.9
"""As sure as that a drafter need not be to go on."""
COMMON_WEIGHT = 6.0
"""Guesses of a sequence that what is known of all sequences counts for, of those that were computed."""
ANSWER, ANSWER_SHARE, LONGER = 128, 0.1, 0.25
"""Tokens of an answer, as long as none has ended; each that ends counts as much in the mean, at least; and one that is
longer than most is expected to go on for such a part of what it has already."""


class GuessTimes:
    """What one more guess of each of n sequences takes, by what it took lately."""

    def __init__(self, cost: StepCost) -> None:
        """cost: predicts steps of the model that is guessed for."""
        self._cost = cost
        self._lately: dict[int, deque[float]] = {}

    def observe(self, count: int, seconds: float) -> None:
        """One guess of each of `count` sequences took so long."""
        self._lately.setdefault(count, deque(maxlen=LAST)).append(seconds)

    def seconds(self, count: int, otherwise: float) -> float:
        """Expected time in seconds: of the nearest number that was measured, for more sequences as much longer as steps
        of so many rows are; `otherwise` where none was."""
        if not self._lately:
            return otherwise
        nearest = min(self._lately, key=lambda known: abs(known - count))
        growth = self._cost.seconds(_rows(count)) / self._cost.seconds(_rows(nearest)) if count > nearest else 1.0
        return statistics.median(self._lately[nearest]) * growth


def _rows(count: int) -> StepShape:
    return StepShape(count, count, count, 0)


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a plan expects of a step, for one of its sequences."""

    steps: ListOf[float]
    """Seconds of the step with 0, 1, … guesses for each sequence that may have some."""
    count: int
    """Of those sequences."""
    guess: float
    """Seconds that one guess more takes to make."""
    token: float
    """Seconds that a token takes at best, whosever it is."""
    depth: int = 0
    """Guesses for each sequence that are best."""
    saved: float = 0.0
    """Seconds that they save a token of each sequence."""

    def worth(self, gain: float, rows: int) -> float:
        """Seconds that so many tokens more save, less what it takes to verify so many guesses."""
        most = len(self.steps) - 1
        known = min(rows, most)
        return gain * self.token - (self.steps[known] - self.steps[0]) * rows / (max(1, known) * self.count)


NO_PROSPECT = Prospect((0.0,), 1, 0.0, 0.0)


class CostlySpeculation(AutoSpeculation):
    """`AutoSpeculation` for a drafter whose guesses cost about as much as a share of a step each.

    How many tokens to guess is decided before they are: as many for each sequence as make expected tokens by expected
    time largest, the time of guessing among it, and none where none do. A text that the drafter has not read costs more
    at first: it is read where the answer is expected to be long enough to earn it, one text at a time, and not as long
    as what was read before has not earned it (`Account`).

    A drafter that can tell how sure it is of each guess may stop by itself, and should go on where guesses are easy: it
    is told how sure of all it has guessed it is to be for one more to be worth its time (`least_sure`), and from what
    it did is learned how far it goes.

    Where guesses are not believed to pay, one is tried now and then, as often as the account has room for what it
    takes. So what guesses are worth is known, of all parts of answers, and knowing it costs no more than the account
    allows. Only verified guesses teach: one that was drawn from probabilities may be right without being what came.
    What is known of all sequences counts for more than with `AutoSpeculation`: a model is right about as often in all
    texts, where a copy is right or wrong.
    """

    computed_kind = 0
    """Of all drafts that were computed: the drafter is asked for a length, or how sure it is to be, and so their
    lengths say nothing of how often they are right."""

    def __init__(self, most: int, cost: StepCost, *, stops: bool = False) -> None:
        """See `AutoSpeculation`. stops: whether the drafter stops by itself where it is not as sure as `least_sure`
        says, if the sequence is greedy: then how many guesses pay on average is no bound."""
        super().__init__(most, cost)
        self._cost = cost
        self._stops = stops
        self._guesses = GuessTimes(cost)
        self._now = self._hoped = NO_PROSPECT
        """Of guessing for those that the drafter has read, and for all, once they are."""
        self._reading = False
        """Whether somebody is asked in this step of whom more is unread than is computed in passing."""
        self._being_read = False
        """Whether a text is: others wait until that one begins to show what it is worth."""
        self._trial: int | None = None
        """Id of the sequence that is asked for a guess in this step, to try it."""
        self._tried: int | None = None
        """Of the one that was in the last."""
        self._num_tried = self._trials = self._last_tried = 0
        self._answer, self._ended = float(ANSWER), 0
        self._reading_expected = self._reading_taken = 0.0
        """Seconds, fading."""
        self._plans = self._planned_again = self._in_vain = 0
        """Steps; the one from which it is worked out again what guesses bring, and how often that was nothing."""
        self._plain = False
        """Whether the step after this one is to be without guesses, to measure what they are compared with."""
        self._answered = 1.0
        """How many of those who are asked for guesses have any: heads have none where they are not sure."""
        self._going_on = 1.0
        """How many guesses are followed by another where more are asked for."""

    def plan(self, ready: ListOf[Sequence], shape: StepShape) -> None:
        """See `Speculation`."""
        self._now = self._hoped = NO_PROSPECT
        self._reading, self._tried, self._trial = False, self._trial, None
        self._plans += 1
        ready = [sequence for sequence in ready if limit(self.most, sequence)]
        self._plain = self._is_plain(self._plans)
        if not ready or self._plain or not self._times.knows(shape.num_tokens):
            return
        if self._plans < self._planned_again:
            return
        self._being_read = any(sequence.drafter_reads for sequence in ready)
        known = [sequence for sequence in ready if self._unread(sequence) <= NEARLY]
        hoped = self._prospect(ready, shape)
        now = hoped if len(known) == len(ready) else self._prospect(known, shape) if known else NO_PROSPECT
        if now.depth or hoped.depth:
            self._now, self._hoped, self._in_vain = now, hoped, 0
            best = min(prospect.token for prospect in (now, hoped) if prospect.depth)
            self._note_gain(hoped.steps[0] / (shape.num_sequences * best))
            return
        self._try_one(ready, self._step_times(ready, shape, 1))
        # Little changes until guesses are tried, and what is expected of them takes a share of a small model's step.
        self._in_vain += 1
        self._planned_again = self._plans + min(1 << min(self._in_vain, 30), LONGEST_REST)

    def _prospect(self, some: ListOf[Sequence], shape: StepShape) -> Prospect:
        """What is best if these are guessed for, and the step's others are not."""
        count = shape.num_sequences
        times = self._step_times(some, shape, self.most)
        one = self._guesses.seconds(len(some), PRIOR_SHARE * times[0])
        rates = [self._computed(sequence) for sequence in some]
        best, tokens, share, depth, saved = margin(count) * count / times[0], float(count), self._answered, 0, 0.0
        guesses = 0.0
        for ahead in range(1, self.most + 1):
            reached = self._reached(ahead - 1)
            guesses += reached
            tokens += share * reached * sum(rate.gain(ahead - 1) for rate in rates)
            rows = times[0] + (times[ahead] - times[0]) * guesses / ahead
            seconds = share * (rows + guesses * one) + (1 - share) * (times[0] + one)
            if tokens / seconds > best:
                best, depth, saved = tokens / seconds, ahead, times[0] / count - seconds / tokens
        if 0 < depth < self.most and self._plans % DEEPER_EVERY == 0:
            # What rows cost that were never measured is a guess; one that is too high would never be put right.
            depth += not self._times.knows(shape.num_tokens + (depth + 1) * len(some))
        return Prospect(times, len(some), one / len(some), 1 / best, depth, saved)

    def _reached(self, level: int) -> float:
        """How often there is a guess at `level` where so many are asked for and there is a first one."""
        return self._going_on**level

    def least_sure(self, sequence: Sequence) -> tuple[float, float]:
        """What verifying and what making one guess more takes, in tokens that such time brings otherwise: the next
        guess is right where all before it are, and where it is right itself."""
        prospect = self._now if self._now.depth else self._hoped
        if not prospect.depth:
            return 0.0, 0.0
        row = (prospect.steps[prospect.depth] - prospect.steps[0]) / (prospect.depth * prospect.count)
        right = prospect.token * self._computed(sequence).later[0].mean
        return min(row / right, SUREST), min(prospect.guess / right, SUREST)

    def wanted(self, sequence: Sequence) -> int:
        """See `Speculation`."""
        if sequence.sequence_id == self._trial:
            depth = 1
        else:
            depth = limit(self._depth(sequence), sequence)
            rate = self._computed(sequence)
            while depth and rate.gain(depth - 1) < LEAST_GAIN:
                depth -= 1
        self._reading |= depth > 0 and self._unread(sequence) > NEARLY
        return depth

    def _depth(self, sequence: Sequence) -> int:
        """How far to guess ahead for a sequence like this one: whose text was read, is, or is now to be."""
        if self._unread(sequence) <= NEARLY:
            depth = self._now.depth
        else:
            depth = self._hoped.depth
            if depth and not self._worth_reading(sequence):
                depth = 0
        return self.most if depth and self._stops_for(sequence) else depth

    def _stops_for(self, sequence: Sequence) -> bool:
        """Whether the drafter says by itself how many of the sequence's guesses are worth it."""
        return self._stops and sequence.sampling.greedy

    def choose(self, drafted: ListOf[Sequence], shape: StepShape, room: int) -> list[int]:
        """See `Speculation`. What guessing them took is spent already."""
        order, gains = self._likeliest(drafted, room)
        length = sum(s.num_tokens for s in drafted) // len(drafted)
        times = self._times.seconds(shape, length, len(order))
        counts = [0] * len(drafted)
        for place in order[: best_count(shape.num_sequences, gains, times)]:
            counts[place] += 1
        for place, sequence in enumerate(drafted):
            tried = sequence.sequence_id == self._tried or self._stops_for(sequence)
            if tried and self._kind(sequence, sequence.draft) == self.computed_kind:
                counts[place] = min(len(sequence.draft), room - sum(counts) + counts[place])
        return counts

    def compare(
        self, sequence: Sequence, draft: tuple[int, ...], parents: tuple[int, ...], tokens: ListOf[int]
    ) -> None:
        """See `Speculation`."""
        super().compare(sequence, draft, parents, tokens)
        self._num_tried += bool(draft) and self._kind(sequence, draft) == self.computed_kind

    def proposed(self, came: ListOf[tuple[int, int]], seconds: float, prepare_seconds: float) -> None:
        """See `Speculation`. Where much is read with the first guesses, what is beyond the others is for that."""
        lengths = [length for _, length in came if length]
        if came and not prepare_seconds:
            self._answered += ANSWERED_SHARE * (len(lengths) / len(came) - self._answered)
            for asked, length in came:
                self._note_length(asked, length)
        if lengths and self._reading:
            expected = max(lengths) * self._guesses.seconds(len(came), 0.0)
            self._reading_taken += max(0.0, seconds - expected)
        elif lengths and len(lengths) == len(came):
            self._guesses.observe(len(came), seconds / max(lengths))
        self._reading_taken += prepare_seconds
        self._aside += seconds
        self._account.saved(-prepare_seconds)

    def _note_length(self, asked: int, length: int) -> None:
        """So many guesses came of those that were asked for."""
        for number in range(1, min(length + 1, asked)):
            self._going_on += GOING_ON_SHARE * ((number < length) - self._going_on)

    def ended(self, sequence: Sequence) -> None:
        """See `Speculation`."""
        self._ended += 1
        share = max(ANSWER_SHARE, 1 / (self._ended + 1))
        self._answer += share * (sequence.num_output_tokens - self._answer)

    def _kind(self, sequence: Sequence, draft: tuple[int, ...]) -> int:
        del sequence, draft
        return self.computed_kind

    def _prior(self, kind: int) -> Acceptance:
        if kind != self.computed_kind:
            return super()._prior(kind)
        return Acceptance.prior(FIRST_COMPUTED, LATER, COMMON_MEMORY)

    def _weight(self, kind: int) -> float:
        return COMMON_WEIGHT if kind == self.computed_kind else super()._weight(kind)

    def _computed(self, sequence: Sequence) -> Acceptance:
        return self._known(sequence, self.computed_kind)

    def _step_times(self, ready: ListOf[Sequence], shape: StepShape, most: int) -> list[float]:
        """Of steps with 0, 1, … guesses verified for each sequence."""
        length = sum(s.num_tokens for s in ready) // len(ready)
        return self._times.seconds(shape, length, most * len(ready), len(ready))

    def _try_one(self, ready: ListOf[Sequence], times: list[float]) -> None:
        """Asks one sequence for a guess if there is time for it: one that takes least, of those the last. times: of
        steps with no guess and with one for each."""
        first = self._num_tried < LEAST_TRIED and self._trials < 2 * LEAST_TRIED
        if not first and self._plans - self._last_tried < TRY_EVERY:
            return
        sequence = min(reversed(ready), key=self._unread)
        guess = self._guesses.seconds(1, PRIOR_SHARE * times[0]) + (times[1] - times[0]) / len(ready)
        cost = 0.0 if sequence.drafter_reads else self._reading_seconds(sequence)
        cost += 0.0 if first else guess
        if cost and self._account.seconds < cost:
            return
        self._trial, self._last_tried = sequence.sequence_id, self._plans
        self._trials += 1
        if not sequence.drafter_reads:
            self._reads(sequence)

    def _unread(self, sequence: Sequence) -> int:
        """Tokens that the drafter has not read, about."""
        return sequence.num_tokens - sequence.num_drafter_tokens

    def _reading_seconds(self, sequence: Sequence) -> float:
        """What the drafter takes for them, by what it took in proportion to what was expected."""
        off = self._reading_taken / self._reading_expected if self._reading_expected else UNKNOWN_OFF
        return self._modelled_seconds(sequence) * max(off, LEAST_OFF)

    def _modelled_seconds(self, sequence: Sequence) -> float:
        """As much longer than for a guess as the model's own step is."""
        unread = self._unread(sequence)
        if unread <= NEARLY:
            return 0.0
        many, one = StepShape(unread, 1, 0, unread * unread // 2), StepShape(1, 1, 1, unread)
        step = self._cost.seconds(one)
        return self._guesses.seconds(1, PRIOR_SHARE * step) * self._cost.seconds(many) / step

    def _worth_reading(self, sequence: Sequence) -> bool:
        if sequence.drafter_reads:
            return True
        said = sequence.num_output_tokens
        left = min(sequence.max_length - sequence.num_tokens, max(self._answer - said, LONGER * said))
        left *= self._computed_share(sequence)
        seconds = self._reading_seconds(sequence)
        if self._being_read or not self._account.bears(seconds, self._hoped.count):
            return False
        if READING_MARGIN * seconds > self._hoped.saved * left:
            return False
        self._reads(sequence)
        return True

    def _computed_share(self, sequence: Sequence) -> float:
        """Of the tokens that are to come those that are not gained in another way."""
        del sequence
        return 1.0

    def _reads(self, sequence: Sequence) -> None:
        """Expects it to be read from now on."""
        sequence.drafter_reads = self._being_read = True
        self._reading_expected = READING_MEMORY * self._reading_expected + self._modelled_seconds(sequence)
        self._reading_taken *= READING_MEMORY
