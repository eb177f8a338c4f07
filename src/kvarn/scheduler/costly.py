"""`CostlySpeculation`: as many guesses as pay where making them takes time, too, as with a draft model."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence as ListOf

from kvarn.scheduler.acceptance import Acceptance
from kvarn.scheduler.auto import LEAST_GAIN, MARGIN, PLAIN_EVERY, AutoSpeculation, best_count
from kvarn.scheduler.cost import StepCost, StepShape
from kvarn.scheduler.sequence import Sequence
from kvarn.scheduler.speculation import limit

PRIOR_SHARE = 0.4
"""What a guess of each sequence is believed to take of a step without guesses, as long as none was measured."""
LAST = 5
"""Measurements of which the median counts, for each number of sequences: some have texts to read first."""
ALLOWANCE = 0.02
"""Of the time of steps, what trying guesses that are not believed to pay may take."""
LEAST_TRIED = 8
"""Guesses that are verified at first, whatever they take, before any is believed to pay."""
DEEPER_EVERY = 4
"""Of the steps with guesses, one has one more of them than is believed best, as long as that was never measured."""
NEARLY = 8
"""Tokens that a drafter may lack of a text without it being worth a thought."""
READING_MEMORY, LEAST_OFF = 0.8, 0.1
"""What is known of the time of reading counts this much less with each text; and a bound of what it may say."""
ANSWERED_SHARE = 0.05
"""Of each step in the share of sequences that guesses came for."""
ANSWER = 128
"""Tokens of an answer, as long as none has ended."""


class GuessTimes:
    """What one more guess of each of n sequences takes, by what it took lately."""

    def __init__(self) -> None:
        self._lately: dict[int, deque[float]] = {}

    def observe(self, count: int, seconds: float) -> None:
        """One guess of each of `count` sequences took so long."""
        self._lately.setdefault(count, deque(maxlen=LAST)).append(seconds)

    def seconds(self, count: int, otherwise: float) -> float:
        """Expected time in seconds: of the nearest number that was measured, for more sequences with the root of their
        ratio, since they share the weights that are read; `otherwise` where none was."""
        if not self._lately:
            return otherwise
        nearest = min(self._lately, key=lambda known: abs(known - count))
        return statistics.median(self._lately[nearest]) * math.sqrt(max(1.0, count / nearest))


class CostlySpeculation(AutoSpeculation):
    """`AutoSpeculation` for a drafter whose guesses cost about as much as a share of a step each.

    How many tokens to guess is decided before they are: as many for each sequence as make expected tokens by expected
    time largest, the time of guessing among it, and none where none do. A text that the drafter has not read costs more
    at first: it is read where the answer is expected to be long enough to earn it.

    Where guesses are not believed to pay, one is tried now and then, as often as a fixed share of the time
    (`ALLOWANCE`) has room for what it takes. So what guesses are worth is known, of all parts of answers, and knowing
    it costs no more. Only verified guesses teach: one that was drawn from probabilities may be right without being what
    came. What is known of all sequences counts for more than with `AutoSpeculation`: a model is right about as often in
    all texts, where a copy is right or wrong.
    """

    prior_weight = 6.0

    def __init__(self, most: int, cost: StepCost) -> None:
        """See `AutoSpeculation`."""
        super().__init__(most, cost)
        self._cost = cost
        self._guesses = GuessTimes()
        self._depth = 0
        self._saved = 0.0
        """Seconds that guessing at that depth is expected to save a token of each sequence."""
        self._allowance = 0.0
        self._trial: int | None = None
        """Id of the sequence that is asked for a guess in this step, to try it."""
        self._tried: int | None = None
        """Of the one that was in the last."""
        self._num_tried = 0
        self._answer = float(ANSWER)
        self._reading_expected = self._reading_taken = 0.0
        """Seconds, fading."""
        self._plans = 0
        self._answered = 1.0
        """How many of those who are asked for guesses have any: heads have none where they are not sure."""

    def plan(self, ready: ListOf[Sequence], shape: StepShape) -> None:
        """See `Speculation`."""
        self._depth, self._saved = 0, 0.0
        self._tried, self._trial = self._trial, None
        self._plans += 1
        ready = [sequence for sequence in ready if limit(self.most, sequence)]
        if not ready:
            return
        if self._plans % PLAIN_EVERY == 0 or not self._times.knows(shape.num_tokens):
            return
        count = shape.num_sequences
        times = self._step_times(ready, shape, self.most)
        one = self._guesses.seconds(count, PRIOR_SHARE * times[0])
        rates = [self._known(sequence) for sequence in ready]
        best, tokens, share = MARGIN * count / times[0], float(count), self._answered
        for depth in range(1, self.most + 1):
            tokens += share * sum(rate.gain(depth - 1) for rate in rates)
            seconds = share * (times[depth] + depth * one) + (1 - share) * (times[0] + one)
            if tokens / seconds > best:
                best, self._depth = tokens / seconds, depth
                self._saved = times[0] / count - seconds / tokens
        if 0 < self._depth < self.most and self._plans % DEEPER_EVERY == 0:
            # What rows cost that were never measured is a guess; one that is too high would never be put right.
            self._depth += not self._times.knows(shape.num_tokens + (self._depth + 1) * count)
        if not self._depth or self._num_tried < LEAST_TRIED:
            self._depth = 0
            self._try_one(ready, times, count)

    def wanted(self, sequence: Sequence) -> int:
        """See `Speculation`."""
        if sequence.sequence_id == self._trial:
            return 1
        depth = limit(self._depth, sequence)
        if not depth or not self._worth_reading(sequence):
            return 0
        rate = self._known(sequence)
        while depth and rate.gain(depth - 1) < LEAST_GAIN:
            depth -= 1
        return depth

    def choose(self, drafted: ListOf[Sequence], shape: StepShape, room: int) -> list[int]:
        """See `Speculation`. What guessing them took is spent already."""
        order, gains = self._likeliest(drafted, room)
        length = sum(s.num_tokens for s in drafted) // len(drafted)
        times = self._times.seconds(shape, length, len(order))
        counts = [0] * len(drafted)
        for place in order[: best_count(shape.num_sequences, gains, times)]:
            counts[place] += 1
        for place, sequence in enumerate(drafted):
            if sequence.sequence_id == self._tried:
                counts[place] = min(len(sequence.draft), room - sum(counts) + counts[place])
        return counts

    def compare(
        self, sequence: Sequence, draft: tuple[int, ...], parents: tuple[int, ...], tokens: ListOf[int]
    ) -> None:
        """See `Speculation`."""
        super().compare(sequence, draft, parents, tokens)
        self._num_tried += bool(draft)

    def timed(self, shape: StepShape, seconds: float) -> None:
        """See `Speculation`."""
        super().timed(shape, seconds)
        self._allowance = min(self._allowance + ALLOWANCE * seconds, 100 * seconds)

    def proposed(self, asked: ListOf[int], came: ListOf[int], seconds: float, prepare_seconds: float) -> None:
        """See `Speculation`."""
        if asked:
            self._answered += ANSWERED_SHARE * (len(came) / len(asked) - self._answered)
        if came and len(came) == len(asked):
            self._guesses.observe(len(came), seconds / max(came))
        self._reading_taken += prepare_seconds
        if self._trial is not None:
            self._allowance -= seconds + prepare_seconds

    def ended(self, sequence: Sequence) -> None:
        """See `Speculation`."""
        self._answer += 0.1 * (sequence.num_output_tokens - self._answer)

    def _kind(self, draft: tuple[int, ...]) -> int:
        """The drafter is asked for a length: it says nothing of how sure it is."""
        del draft
        return 0

    def _known(self, sequence: Sequence) -> Acceptance:
        return self._of(sequence, ())

    def _step_times(self, ready: ListOf[Sequence], shape: StepShape, most: int) -> list[float]:
        """Of steps with 0, 1, … guesses verified for each sequence."""
        length = sum(s.num_tokens for s in ready) // len(ready)
        return self._times.seconds(shape, length, most * len(ready), len(ready))

    def _try_one(self, ready: ListOf[Sequence], times: list[float], count: int) -> None:
        """Asks one sequence for a guess if there is time for it: one that takes least, of those the last."""
        sequence = min(reversed(ready), key=self._unread)
        guess = self._guesses.seconds(1, PRIOR_SHARE * times[0]) + (times[1] - times[0]) / count
        reading = 0.0 if sequence.drafter_reads else self._reading_seconds(sequence)
        if self._allowance < guess + reading and self._num_tried >= LEAST_TRIED:
            return
        self._trial = sequence.sequence_id
        if not sequence.drafter_reads:
            self._reads(sequence)

    def _unread(self, sequence: Sequence) -> int:
        """Tokens that the drafter has not read, about."""
        return sequence.num_tokens - sequence.num_drafter_tokens

    def _reading_seconds(self, sequence: Sequence) -> float:
        """What the drafter takes for them, by what it took in proportion to what was expected."""
        off = self._reading_taken / self._reading_expected if self._reading_expected else 1.0
        return self._modelled_seconds(sequence) * max(off, LEAST_OFF)

    def _modelled_seconds(self, sequence: Sequence) -> float:
        """As much longer than for a guess as the model's own step is."""
        unread = self._unread(sequence)
        if unread <= NEARLY:
            return 0.0
        many, one = StepShape(unread, 1, 0, unread * unread // 2), StepShape(1, 1, 1, unread)
        return self._guesses.seconds(1, 0.0) * self._cost.seconds(many) / self._cost.seconds(one)

    def _worth_reading(self, sequence: Sequence) -> bool:
        if sequence.drafter_reads or self._unread(sequence) <= NEARLY:
            return True
        left = min(sequence.max_length - sequence.num_tokens, max(self._answer - sequence.num_output_tokens, 0))
        if self._reading_seconds(sequence) > self._saved * left:
            return False
        self._reads(sequence)
        return True

    def _reads(self, sequence: Sequence) -> None:
        """Expects it to be read from now on."""
        sequence.drafter_reads = True
        self._reading_expected = READING_MEMORY * self._reading_expected + self._modelled_seconds(sequence)
        self._reading_taken *= READING_MEMORY
