"""How many tokens are guessed where that is chosen: what pays, and no more."""

import random
from types import SimpleNamespace

import pytest
from virtual_time import LinearCost

from kvarn.draft_tree import chain
from kvarn.scheduler import AutoSpeculation, StepShape
from kvarn.scheduler.acceptance import Acceptance
from kvarn.scheduler.auto import MARGIN, RowTimes, _worth


def sequence(draft=8, tokens=50):
    return SimpleNamespace(
        draft=(1,) * draft, parents=chain(draft), num_tokens=tokens, acceptance={},
        sampling=SimpleNamespace(num_speculative_tokens=None),
    )  # fmt: skip


def propose(one, count):
    one.draft, one.parents = (1,) * count, chain(count)


def decodes(count, tokens=50):
    return StepShape(count, count, count, count * tokens, count * tokens)


class Machine:
    """Steps whose time the controller is told, over guesses that are right with a given probability each."""

    def __init__(self, cost, rates, *, believed=None, most=8, seed=1):
        self.control = AutoSpeculation(most, believed or cost)
        self.cost = cost
        self.sequences = [sequence(most) for _ in rates]
        self.rates = rates
        self.random = random.Random(seed)
        self.tokens = self.seconds = 0.0
        self.asked = 0

    def step(self):
        """The counts that were verified. Drafts are there where they are wanted."""
        shape, most = decodes(len(self.sequences)), self.control.most
        for one in self.sequences:
            propose(one, self.control.wanted(one))
        self.asked += any(one.draft for one in self.sequences)
        drafted = [one for one in self.sequences if one.draft]
        counts = self.control.choose(drafted, shape, 64) if drafted else [0] * len(self.sequences)
        assert len(counts) == len(self.sequences) and max(counts) <= most
        for one, rate, count in zip(self.sequences, self.rates, counts, strict=True):
            right = 0
            while right < count and self.random.random() < rate:
                right += 1
            # The token after the accepted ones is what the draft says there, if the draft is longer, or it is not.
            lucky = right == count and self.random.random() < rate
            said = [1] * right + [1 if lucky else 0]
            self.control.compare(one, one.draft, one.parents, said)
            shape = shape.drafted(one.num_tokens, count)
            self.tokens += right + 1
        self.control.timed(shape, self.cost.seconds(shape))
        self.seconds += self.cost.seconds(shape)
        return counts

    def run(self, steps):
        return [self.step() for _ in range(steps)]


def best_k(rate, cost, most=8):
    """By (1 - a^(K+1)) / (1 - a) tokens in the time of 1 + K rows (Leviathan et al. 2023, section 3)."""

    def speed(k):
        return sum(rate**i for i in range(k + 1)) / cost.seconds(decodes(1).drafted(50, k))

    return max(range(most + 1), key=speed)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("row", [0.0002, 0.001, 0.004])
def test_as_many_are_verified_as_bring_most_tokens_a_second(rate, row):
    cost = LinearCost(fixed=0.004, token=row, sampled=0.0)
    machine = Machine(cost, [rate])
    machine.run(200)
    chosen = [counts[0] for counts in machine.run(400)]
    best = best_k(rate, cost)
    plain = 1 / cost.seconds(decodes(1))
    gain = (machine.tokens / machine.seconds) / plain
    ideal = sum(rate**i for i in range(best + 1)) / cost.seconds(decodes(1).drafted(50, best)) / plain
    assert gain > 0.97 + 0.75 * max(0.0, ideal - MARGIN), "it loses no more than what trying costs"
    assert abs(sum(chosen) / len(chosen) - best) < 2.5


def test_a_busy_batch_stops_guessing_by_itself():
    """The same guesses pay for one sequence, not for sixteen, where a row costs as much as a step beyond four rows."""

    class Steep(LinearCost):
        def seconds(self, shape):
            return 0.004 + 0.0002 * min(shape.num_tokens, 8) + 0.004 * max(0, shape.num_tokens - 8)

    alone, crowd = Machine(Steep(), [0.7]), Machine(Steep(), [0.7] * 16)
    assert sum(map(sum, alone.run(200))) / 200 > 2
    crowd.run(100)
    crowd.asked = 0
    tried = [sum(counts) for counts in crowd.run(640)]
    assert sum(count > 0 for count in tried) <= 640 // 32
    assert crowd.asked <= 640 // 8 + 10, "and they are not asked for in every step"


def test_the_likelier_guesses_are_taken_whosever_they_are():
    machine = Machine(LinearCost(fixed=0.004, token=0.001, sampled=0.0), [0.95, 0.2])
    machine.run(200)
    good, bad = (sum(column) / 400 for column in zip(*machine.run(400), strict=True))
    assert good > 2.5
    assert bad < 0.5


def test_what_rows_cost_is_learned_from_steps_and_not_believed():
    """A model of steps that says rows cost nothing is corrected; one that says they cost a lot is tried again."""
    dear, cheap = (LinearCost(fixed=0.004, token=t, sampled=0.0) for t in (0.004, 0.0001))
    fooled = Machine(dear, [0.3], believed=cheap)
    assert fooled.step() == [0], "what guesses are compared with is measured first"
    fooled.run(100)
    assert sum(counts[0] for counts in fooled.run(320)) <= 8 * 320 // 32
    timid = Machine(cheap, [0.9], believed=LinearCost(fixed=0.001, token=0.02, sampled=0.0))
    timid.run(400)
    assert sum(counts[0] for counts in timid.run(100)) > 400


def test_guesses_that_are_not_verified_teach_as_well():
    """A text that begins to repeat is found out without a row spent on it."""
    machine = Machine(LinearCost(fixed=0.004, token=0.002, sampled=0.0), [0.0])
    machine.run(100)
    assert machine.step() == [0]
    machine.rates = [1.0]
    assert next(i for i in range(200) if machine.step()[0]) < 60


def test_guesses_that_are_wrong_when_they_are_verified_and_right_otherwise_cost_little():
    """What it believes is wrong whenever it acts on it: only what steps really brought can tell."""
    control, cost = AutoSpeculation(8, LinearCost()), LinearCost(fixed=0.004, token=0.001, sampled=0.0)
    one, seconds, tokens = sequence(0), 0.0, 0
    for _ in range(3000):
        (count,) = control.choose([one], decodes(1), 64) if one.draft else (0,)
        shape = decodes(1).drafted(50, count)
        control.compare(one, one.draft, one.parents, [0] if count else [1])
        control.timed(shape, cost.seconds(shape))
        seconds, tokens = seconds + cost.seconds(shape), tokens + 1
        propose(one, control.wanted(one))
    assert seconds <= tokens * cost.seconds(decodes(1)) / 0.97


def test_drafts_of_different_length_are_judged_apart():
    """The short ones of a drafter that proposes more where it is surer are wrong here, the long ones right."""
    control = AutoSpeculation(8, cost := LinearCost(fixed=0.004, token=0.001, sampled=0.0))
    one = sequence()
    chosen = {2: [], 8: []}
    for turn in range(400):
        length = (2, 8)[turn % 2]
        propose(one, min(length, control.wanted(one)))
        counts = control.choose([one], decodes(1), 64) if one.draft else [0]
        said = [0] if length == 2 else [1] * counts[0] + [1]
        control.compare(one, one.draft, one.parents, said)
        chosen[length].append(counts[0])
        shape = decodes(1).drafted(50, counts[0])
        control.timed(shape, cost.seconds(shape))
    assert sum(chosen[2][50:]) < 10
    assert sum(chosen[8][50:]) > 4 * 100


def test_acceptance_counts_guesses_up_to_the_first_wrong_one():
    acceptance = Acceptance.prior(0.5, 0.5)
    acceptance.compare((1, 2, 3, 4), [1, 2, 9])
    first, later = acceptance.first[0], acceptance.later[0]
    assert (first.right > first.wrong, later.right == pytest.approx(later.wrong, rel=0.3)) == (True, True)
    before = acceptance.gains(chain(3))
    assert before[0] == first.mean
    assert before[2] == pytest.approx(first.mean * later.mean**2)
    acceptance.compare((), [1])
    acceptance.compare((1,), [])
    assert acceptance.gains(chain(3)) == before


def test_acceptance_tells_the_guesses_of_one_token_apart():
    """The second one of the next token is right; after it the first, and after that none of two."""
    acceptance = Acceptance.prior(0.5, 0.5)
    tree = (-1, -1, 1, 0, 1, 2, 2)
    before = acceptance.gains(tree)
    assert before[0] > before[1] > 0
    assert before[2] == pytest.approx(before[1] * acceptance.later[0].mean)
    assert before[4] == pytest.approx(before[1] * acceptance.later[1].mean)
    for _ in range(40):
        acceptance.compare((1, 2, 3, 3, 4, 5, 6), [2, 3, 9], tree)
    first, second, follows, behind_wrong, other, *beyond = acceptance.gains(tree)
    assert first < 0.05 and behind_wrong < 0.05
    assert second > 0.9
    assert 0.4 < follows < 0.6, "right after the second, then nothing is"
    assert other < 0.05
    assert max(beyond) < 0.3
    begun = acceptance.start()
    assert begun.gains(tree) == pytest.approx(acceptance.gains(tree))
    begun.compare((1,), [1])
    assert begun.gains(tree)[0] > acceptance.gains(tree)[0] + 0.2, "what a sequence starts from is soon forgotten"


def test_a_guess_that_a_better_one_follows_is_worth_what_they_bring_together():
    assert _worth([0.5, 0.25, 0.125]) == [0.5, 0.25, 0.125]
    assert _worth([0.1, 0.3, 0.5, 0.1]) == pytest.approx([0.3, 0.3, 0.3, 0.1])
    assert _worth([0.4, 0.1, 0.3, 0.0]) == pytest.approx([0.4, 0.2, 0.2, 0.0])
    assert _worth([]) == []


def test_branches_are_verified_where_they_pay():
    """Of two guesses of the next token the drafter's second is always right, and so is what follows it."""
    control = AutoSpeculation(6, cost := LinearCost(fixed=0.004, token=0.0005, sampled=0.0))
    one = sequence(0)
    chosen = []
    for _ in range(300):
        if control.wanted(one):
            one.draft, one.parents = (1, 2, 1, 3, 4), (-1, -1, 0, 1, 3)
        (count,) = control.choose([one], decodes(1), 64)
        chosen.append(count)
        said = [2, 3, 4, 7] if count == 5 else [2, 3, 7] if count == 4 else [2, 7] if count else [2]
        control.compare(one, one.draft, one.parents, said)
        shape = decodes(1).drafted(50, count)
        control.timed(shape, cost.seconds(shape))
    assert sum(count == 5 for count in chosen[50:]) > 200


def test_times_are_by_rows_and_between_them_interpolated():
    times = RowTimes(LinearCost(fixed=1.0, token=0.0, sampled=0.0, attended=0.0))
    assert times.seconds(decodes(3), 50, 0) == [1.0]
    times.observe(decodes(1), 2.0)
    times.observe(decodes(5), 4.0)
    times.observe(StepShape(100, 1, 1, 100), 50.0)  # a prompt says nothing of rows
    assert times.seconds(decodes(1), 50, 8) == [2.0, 2.5, 3.0, 3.5, 4.0, 4.0, 4.0, 4.0, 4.0]
    assert times.knows(5)
    assert not times.knows(9)
    times.observe(decodes(9), 6.0)
    assert times.knows(12), "more than a few rows are measured by fours"
    for _ in range(20):
        times.observe(decodes(1), 2.0)
    times.observe(decodes(1), 1000.0)
    assert times.seconds(decodes(1), 50, 0)[0] < 2.5, "one step beside a busy neighbour"
