"""Guesses of two sources, and what every controller promises: it takes no longer than no guesses."""

import hypothesis.strategies as st
import pytest
from guessing_machine import GuessingMachine
from hypothesis import given, settings

from kvarn.scheduler import AutoSpeculation, CostlySpeculation, TwoSources

STEPS = (0.010, 0.0115, 0.013, 0.017, 0.026, 0.045, 0.085)
"""Seconds of steps of 1, 2, 4, … rows of a model that is bound by reading its weights."""
MOST_SLOWDOWN = 1 / 0.97
CONTROLS = {
    "copies": lambda cost: AutoSpeculation(8, cost),
    "computed": lambda cost: CostlySpeculation(8, cost),
    "both": lambda cost: TwoSources(4, 8, cost),
    "stopping": lambda cost: TwoSources(8, 8, cost, stops=True),
}


def machine(control, **settings):
    return GuessingMachine(CONTROLS[control], **{"rows": STEPS, "guess": 0.003, "read": 0.0003, **settings})


def test_both_sources_bring_more_than_either():
    text = {"found": 0.5, "copied": (0.85, 0.9), "computed": (0.75, 0.8)}
    slowdowns = {control: machine(control, **text).run(6000).slowdown for control in ("copies", "computed", "both")}
    assert slowdowns["both"] < 0.93 * min(slowdowns["copies"], slowdowns["computed"])


@pytest.mark.parametrize("rate", [0.75, 0.85])
def test_a_drafter_that_knows_where_it_is_unsure_stops_there(rate):
    """Which is worth more than a number of guesses that is the same in all places."""
    asked, stopped = (
        machine(control, computed=(rate, rate), knows=1.0).run(6000).slowdown for control in ("both", "stopping")
    )
    assert stopped < 0.98 * asked


def test_in_a_batch_one_that_is_sure_does_not_make_the_others_wait():
    """One guess more takes as long for one sequence as for all."""
    text = {"computed": (0.85, 0.85), "knows": 1.0, "batch": 4, "guess": 0.005}
    asked, stopped = (machine(control, **text).run(6000).slowdown for control in ("both", "stopping"))
    assert stopped < 1.01 * asked


@pytest.mark.parametrize("knows", [0.0, 0.3, 1.0, 3.0])
def test_one_that_is_wrong_about_itself_is_found_out(knows):
    """It may hold all of its guesses right, or hardly any: steps take no longer than without."""
    for rate in (0.1, 0.5):
        for guess in (0.001, 0.005):
            made = machine("stopping", computed=(rate, rate), knows=knows, guess=guess, prompt=(20, 300))
            assert made.run(4000).slowdown <= MOST_SLOWDOWN, (rate, guess)


def test_copies_that_are_worth_less_make_way_for_the_drafter():
    """And not where the drafter is dear, or no better."""
    shares = {}
    for name, guess, computed in (("good", 0.001, 0.9), ("dear", 0.012, 0.9), ("bad", 0.001, 0.1)):
        made = machine("both", found=0.7, copied=(0.4, 0.4), computed=(computed, computed), guess=guess).run(1000)
        made.reset()
        made.run(4000)
        shares[name] = made.verified[True] / (made.verified[True] + made.verified[False])
    assert shares["good"] < 0.1
    assert min(shares["dear"], shares["bad"]) > 0.8


def test_what_costs_nothing_goes_on_when_the_drafter_is_in_debt():
    """Texts that were read in vain stop reading, not copying."""
    made = machine("both", found=0.5, copied=(0.9, 0.9), computed=(0.0, 0.0), prompt=(800, 800), read=0.002).run(6000)
    assert made.slowdown < 0.8
    assert made.asked < 300


# The same machines in every run: one in thousands of random ones may be worse luck than the bound allows.
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    control=st.sampled_from(list(CONTROLS)),
    batch=st.sampled_from([1, 4, 16]),
    growth=st.lists(st.floats(1.02, 2.0), min_size=6, max_size=6),
    guess=st.floats(0.02, 0.8),
    read=st.floats(0.5, 2),
    rates=st.tuples(*[st.floats(0, 0.98)] * 4),
    found=st.floats(0, 1),
    prompt=st.integers(1, 1500),
    answer=st.integers(4, 400),
    seed=st.integers(0, 1000),
    knows=st.sampled_from([None, 0.2, 1.0, 2.0]),
)
def test_no_controller_loses_whatever_steps_cost_and_guesses_are_worth(
    control, batch, growth, guess, read, rates, found, prompt, answer, seed, knows
):
    """guess: of a step. read: against what the growth of steps and the time of a guess let expect of a token.

    After 2,000 tokens (8,000 of a batch) it has taken at most 1 / 0.97 of the time.
    """
    rows = [0.01]
    for factor in growth:
        rows.append(rows[-1] * factor)
    read *= guess * (rows[-1] - rows[-2]) / 32
    computed, copied = sorted(rates[:2]), sorted(rates[2:])
    made = machine(
        control, batch=batch, rows=rows, guess=guess * 0.01, read=read, computed=computed, copied=copied,
        found=found, prompt=(1, prompt), answer=answer, seed=seed, knows=knows,
    )  # fmt: skip
    assert made.run(2000 * min(batch, 4)).slowdown <= MOST_SLOWDOWN


@pytest.mark.parametrize("control", list(CONTROLS))
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_a_text_in_which_nothing_is_right_any_more_costs_little(control, batch):
    made = machine(control, batch=batch, found=0.8, copied=(0.9, 0.9), computed=(0.9, 0.9)).run(4000)
    made.copied = made.computed = (0.05, 0.1)
    made.reset()
    assert made.run(1000 * batch).slowdown <= MOST_SLOWDOWN
