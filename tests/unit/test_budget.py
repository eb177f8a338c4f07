"""How large steps are: constant, or such that running streams keep their time between tokens."""

import itertools

import pytest
from virtual_time import Arrival, LinearCost, gaps, simulate

from kvarn.config import SchedulerConfig
from kvarn.errors import ConfigError
from kvarn.scheduler import (
    ConstantBudget,
    FirstComeFirstServed,
    ItlBudget,
    MeasuredCost,
    StepShape,
    make_budget,
)
from kvarn.scheduler.budget import MARGIN, MIN_PROMPT_TOKENS

COST = LinearCost()
NOTHING = StepShape(0, 0, 0, 0)
EIGHT = StepShape(8, 8, 8, 8 * 100)


def test_a_constant_budget_is_what_decodes_leave():
    step = ConstantBudget(64).open(EIGHT)
    assert step.room(0, 1000, reserved=0) == 56
    assert step.room(0, 1000, reserved=6) == 50
    assert step.room(0, 3, reserved=6) == 3
    step.take(0, 50)
    assert [step.room(0, 10, reserved) for reserved in (0, 6, 7)] == [6, 0, 0]


def test_a_chunk_is_as_long_as_the_target_allows():
    step = ItlBudget(512, 0.1, COST).open(EIGHT)
    count = step.room(500, 1000, reserved=0)
    assert COST.seconds(EIGHT.plus(500, count)) <= MARGIN * 0.1 < COST.seconds(EIGHT.plus(500, count + 1))
    assert step.room(100, 10, reserved=0) == 10, "no more than is wanted"
    step.take(500, count)
    assert step.room(0, 1000, reserved=0) == 0


def test_further_into_a_prompt_the_chunks_are_shorter():
    rooms = [ItlBudget(512, 0.1, COST).open(EIGHT).room(start, 1000, 0) for start in (0, 1000, 4000)]
    assert rooms == sorted(rooms, reverse=True)
    assert rooms[0] > rooms[2]


def test_without_running_streams_a_step_is_as_large_as_it_may_be():
    assert ItlBudget(512, 1e-6, COST).open(NOTHING).room(0, 1000, 0) == 512


def test_a_target_that_cannot_be_met_leaves_prompts_a_little():
    step = ItlBudget(512, 1e-6, COST).open(EIGHT)
    assert step.room(0, 1000, 0) == MIN_PROMPT_TOKENS
    step.take(0, 10)
    assert step.room(0, 1000, 0) == MIN_PROMPT_TOKENS - 10
    step.take(0, 6)
    assert step.room(0, 1000, 0) == 0


def test_settings_make_it():
    assert isinstance(make_budget(SchedulerConfig(), COST), ConstantBudget)
    assert isinstance(make_budget(SchedulerConfig(itl_target_ms=40), COST), ItlBudget)
    with pytest.raises(ConfigError, match="itl_target_ms must be above 0, not 0"):
        SchedulerConfig(itl_target_ms=0)


class LearnedCost(LinearCost):
    """A machine, and what is learned of it while it runs."""

    def __init__(self):
        super().__init__()
        self.learned = MeasuredCost()

    def seconds(self, shape):
        taken = super().seconds(shape)
        self.learned.observe(shape, taken)
        return taken


STREAMS = [Arrival(0.1 * i, "", 50, 400) for i in range(4)]
LONG = [Arrival(3.0 + 0.1 * i, "", 3000, 5) for i in range(2)]


def test_streams_keep_their_target_while_long_prompts_are_computed():
    machine = LearnedCost()
    target = 0.06
    answers = simulate(STREAMS + LONG, FirstComeFirstServed(), machine, budget=ItlBudget(512, target, machine.learned),
                       tokens=512)  # fmt: skip
    assert [len(times) for _, times in answers] == [400] * 4 + [5] * 2
    streams = gaps(answers[:4])
    late = sum(gap > target for gap in streams)
    assert late <= 2, "while the cost of a chunk is still being learned"
    assert max(gaps(simulate(STREAMS + LONG, FirstComeFirstServed(), LinearCost(), tokens=512)[:4])) > 8 * target


def test_long_prompts_get_on_whatever_the_target_is():
    answers = simulate(STREAMS + LONG, FirstComeFirstServed(), COST, budget=ItlBudget(512, 1e-6, COST), tokens=512)
    alone = simulate(LONG[:1], FirstComeFirstServed(), COST, tokens=512)
    assert all(times for _, times in answers)
    slowest = max(times[0] - arrival.time for arrival, times in answers)
    assert slowest < 20 * (alone[0][1][0] - 3.0)


def test_prompts_use_the_time_that_streams_leave():
    """The target costs little: both prompts are computed at nearly the speed of large steps."""
    first_tokens = []
    for budget in (ItlBudget(512, 0.06, COST), ConstantBudget(512)):
        answers = simulate(STREAMS + LONG, FirstComeFirstServed(), COST, budget=budget, tokens=512)
        first_tokens.append(max(times[0] for _, times in itertools.islice(answers, 4, None)))
    assert first_tokens[0] < 1.5 * first_tokens[1]
