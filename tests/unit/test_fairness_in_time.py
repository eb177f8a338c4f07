"""One key sends ten times the load of another: what that does to the light one's TTFT, in virtual time."""

import pytest
from virtual_time import LinearCost, percentile, poisson, simulate, ttfts

from kvarn.scheduler import FairShare, FirstComeFirstServed, ItlBudget

SLOW = LinearCost()
FAST = LinearCost(fixed=0.0015, token=0.00028, sampled=0.00015, attended=2e-8)
"""Near what SmolLM2 takes on two threads."""
SECONDS = 60


class Town:
    """A machine, and what two tenants send it: together more than it can do."""

    def __init__(self, cost, rate, **sizes):
        self.cost = cost
        self.light = list(poisson("light", rate, SECONDS, seed=6, **sizes))
        self.heavy = list(poisson("heavy", 10 * len(self.light) / SECONDS, SECONDS, seed=7, **sizes))

    def light_p99(self, arrivals, policy):
        """TTFT of the light tenant."""
        answers = simulate(arrivals, policy, self.cost, budget=ItlBudget(512, 0.05, self.cost), tokens=512)
        assert all(len(times) == arrival.output_tokens for arrival, times in answers), "everybody is answered"
        return percentile(ttfts(answers, "light"), 99)


TOWNS = {"short": (SLOW, 0.4, 300, 32), "long": (SLOW, 0.3, 500, 32), "fast": (FAST, 1.2, 256, 16)}


@pytest.fixture(scope="module", params=TOWNS)
def town(request):
    cost, rate, prompt, output = TOWNS[request.param]
    return Town(cost, rate, prompt=prompt, output=output)


@pytest.fixture(scope="module")
def alone(town):
    return town.light_p99(town.light, FairShare())


def test_under_fair_shares_a_light_tenant_hardly_feels_a_heavy_one(town, alone):
    assert len(town.heavy) > 9 * len(town.light)
    assert town.light_p99(town.light + town.heavy, FairShare()) <= 2 * alone


def test_first_come_first_served_lets_it_wait(town, alone):
    assert town.light_p99(town.light + town.heavy, FirstComeFirstServed()) > 10 * alone


def test_alone_the_two_are_the_same(town, alone):
    assert town.light_p99(town.light, FirstComeFirstServed()) == alone
