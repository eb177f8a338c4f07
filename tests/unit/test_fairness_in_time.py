"""One key sends ten times the load of another: what that does to the light one's TTFT, in virtual time."""

import pytest
from virtual_time import LinearCost, percentile, poisson, simulate, ttfts

from kvarn.scheduler import FairShare, FirstComeFirstServed, ItlBudget

COST = LinearCost()
SECONDS = 240
SIZES = {"prompt": 300, "output": 32}
LIGHT = list(poisson("light", 0.4, SECONDS, seed=1, **SIZES))
HEAVY = list(poisson("heavy", 4.0, SECONDS, seed=2, **SIZES))


def light_p99(arrivals, policy):
    answers = simulate(arrivals, policy, COST, budget=ItlBudget(256, 0.05, COST))
    assert all(len(times) == arrival.output_tokens for arrival, times in answers), "everybody is answered"
    return percentile(ttfts(answers, "light"), 99)


@pytest.fixture(scope="module")
def alone():
    return light_p99(LIGHT, FairShare())


def test_under_fair_shares_a_light_tenant_hardly_feels_a_heavy_one(alone):
    assert len(HEAVY) > 9 * len(LIGHT)
    assert light_p99(LIGHT + HEAVY, FairShare()) <= 2 * alone


def test_first_come_first_served_lets_it_wait(alone):
    assert light_p99(LIGHT + HEAVY, FirstComeFirstServed()) > 10 * alone


def test_alone_the_two_are_the_same(alone):
    assert light_p99(LIGHT, FirstComeFirstServed()) == alone
