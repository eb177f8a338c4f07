"""A machine in a time that only steps move, with guesses of given cost that are right with given probabilities."""

import random
from types import SimpleNamespace

from kvarn.draft_tree import chain
from kvarn.scheduler import CostlySpeculation, MeasuredCost, StepShape
from kvarn.scheduler.fitted_cost import FittedStepCost

NEARLY = 8
"""Tokens that a drafter reads in passing."""


class GuessingMachine:
    """Sequences that follow one another in a batch, in steps whose guesses a controller chooses.

    Of each sequence a rate is drawn at which computed guesses are right, and one at which copies are. A part of its
    text can be copied, in passages of 5 to 30 tokens.
    """

    def __init__(
        self, new_control, *, rows, batch=1, guess=0.0, read=0.0, computed=(0.5, 0.5), found=0.0, copied=(0.5, 0.5),
        prompt=(50, 50), answer=128, seed=0, knows=None,
    ):  # fmt: skip
        """new_control: of what predicts steps, as in an engine. rows: seconds of steps of 1, 2, 4, … rows.

        guess: seconds of one more guess of all, read: of a token that the drafter reads. found: the part of passages of
        which something can be copied. computed, copied, prompt: between what each sequence's rates and length are
        drawn. knows: the drafter is told of each of its guesses how probable it is, to this power (below 1: it thinks
        too well of itself), and stops where the controller says; None: it has no idea, and guesses what it is asked
        for."""
        knots = tuple(2**place for place in range(len(rows)))
        self.cost = FittedStepCost(knots, tuple(rows), 0.0, 0.0, 0.0)
        self.believed = MeasuredCost()
        self.control = new_control(self.believed)
        self.batch, self.guess, self.read, self.found, self.answer = batch, guess, read, found, answer
        self.computed, self.copied, self.prompt = computed, copied, prompt
        self.knows = knows
        self.random = random.Random(seed)
        self.numbers = iter(range(1 << 30))
        self.sequences = [self.sequence() for _ in range(batch)]
        self.tokens, self.seconds = 0, 0.0
        self.verified = {False: 0, True: 0}
        """Guesses, by whether they were copied."""
        self.asked = 0
        """Steps in which somebody was asked to compute guesses."""

    def sequence(self):
        length = self.random.randint(*self.prompt)
        self.took(StepShape(length, 1, 1, length * length // 2, length))
        return SimpleNamespace(
            draft=(), parents=(), chances=(), copied=False, num_tokens=length, acceptance={}, num_drafter_tokens=0,
            sampling=SimpleNamespace(num_speculative_tokens=None, greedy=True), sequence_id=next(self.numbers),
            num_output_tokens=0, num_accepted_copies=0, drafter_reads=False, max_length=length + self.answer,
            passages=self.passages(),
            computed_rate=self.random.uniform(*self.computed), copied_rate=self.random.uniform(*self.copied),
        )  # fmt: skip

    def took(self, shape):
        """Tells of a step."""
        seconds = self.cost.seconds(shape)
        self.believed.observe(shape, seconds)
        self.control.timed(shape, seconds)
        return seconds

    def passages(self):
        """Of each place of an answer how far the copy goes that is found there."""
        found = []
        while len(found) <= self.answer:
            length = self.random.randint(5, 30)
            found += range(length, 0, -1) if self.random.random() < self.found else [0] * length
        return found

    @property
    def slowdown(self):
        """Time taken against steps without guesses."""
        return self.seconds / (self.tokens * self.cost.seconds(self.plain()) / self.batch)

    def plain(self):
        length = sum(one.num_tokens for one in self.sequences)
        return StepShape(self.batch, self.batch, self.batch, length, length)

    def run(self, tokens):
        end = self.tokens + tokens
        while self.tokens < end:
            self.step()
        return self

    def reset(self):
        self.tokens, self.seconds, self.asked = 0, 0.0, 0
        self.verified = {False: 0, True: 0}

    def step(self):
        shape = plain = self.plain()
        self.control.plan(self.sequences, plain)
        drafted = [one for one in self.sequences if one.draft]
        chosen = self.control.choose(drafted, plain, 64) if drafted else []
        counts = {one.sequence_id: count for one, count in zip(drafted, chosen, strict=True)}
        wanted = [self.wanted(one) for one in self.sequences]
        for one in self.sequences:
            count = counts.get(one.sequence_id, 0)
            shape = shape.drafted(one.num_tokens, count)
            self.say(one, count)
        self.propose(wanted)
        self.seconds += self.took(shape)
        for place, one in enumerate(self.sequences):
            if one.num_output_tokens >= self.answer:
                self.control.ended(one)
                self.sequences[place] = self.sequence()

    def wanted(self, one):
        """Guesses to be computed, to be copied, how many to be copied at least, and how sure a drafter is to be."""
        count = self.control.wanted(one)
        if not isinstance(self.control, CostlySpeculation):
            return 0, count, 0, (0.0, 0.0)
        return count, *self.control.copies(one), self.control.least_sure(one)

    def say(self, one, count):
        """What comes in the place of its draft, of which so many are verified."""
        rate, right = one.copied_rate, 0
        while right < count and self.random.random() < one.chances[right]:
            right += 1
        # After the last verified guess a token comes that may be as the unverified ones of a copy say.
        lucky = one.copied and right == count and self.random.random() < rate
        told = one.draft if one.copied else one.draft[:count]
        self.control.compare(one, told, chain(len(told)), [1] * right + [1 if lucky else 0])
        self.verified[one.copied] += count
        one.num_accepted_copies += right * one.copied
        self.tokens += right + 1
        one.num_tokens += right + 1
        one.num_output_tokens += right + 1

    def propose(self, wanted):
        reading, asked = 0.0, []
        for one, (depth, copies, least, sure) in zip(self.sequences, wanted, strict=True):
            length = min(one.passages[min(one.num_output_tokens, self.answer)], copies)
            length = length if length >= least else 0
            one.copied = length > 0
            one.chances = [one.copied_rate] * length
            if depth and not length:
                asked.append((one, depth, *sure))
                unread = one.num_tokens - one.num_drafter_tokens
                reading += self.read * unread if unread > NEARLY else 0.0
                one.num_drafter_tokens, one.drafter_reads = one.num_tokens, False
        seconds = self.guess * self.compute(asked)
        for one in self.sequences:
            one.draft, one.parents = (1,) * len(one.chances), chain(len(one.chances))
        self.asked += bool(asked)
        self.control.proposed([(depth, len(one.chances)) for one, depth, *_ in asked], seconds, reading)
        self.seconds += seconds + reading

    def compute(self, asked):
        """Guesses of those that are asked for them, one more of all at a time; how many times."""
        going = [(one, depth, least, 1.0) for one, depth, least, _ in asked]
        cost, times = sum(cost for *_, cost in asked), 0
        while going:
            times += 1
            longer = []
            for one, depth, least, believed in going:
                one.chances.append(self.chance(one.computed_rate))
                believed *= 1.0 if self.knows is None else one.chances[-1] ** self.knows
                if len(one.chances) < depth and (self.knows is None or believed >= least):
                    longer.append((one, depth, least, believed))
            going = longer
            if self.knows is not None and sum(believed - least for *_, least, believed in going) < cost:
                going = []
        return times

    def chance(self, rate):
        """How probable a guess is: nearly sure or unlikely, `rate` in the mean, if anybody knows."""
        if self.knows is None:
            return rate
        high, low = 1 - 0.2 * (1 - rate), 0.3 * rate
        return high if self.random.random() < (rate - low) / (high - low) else low
