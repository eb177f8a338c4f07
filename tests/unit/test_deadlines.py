"""Requests that ask to be refused where their first token would come too late."""

import random

import pytest
from paged_model import PagedModel
from virtual_time import BLOCK, LinearCost

from kvarn.cache import BlockPool, RadixPrefixCache
from kvarn.config import SchedulerConfig
from kvarn.errors import ConfigError, DeadlineError, RequestError
from kvarn.request import Request, SamplingParams
from kvarn.scheduler import StepShape, make_scheduler

COST = LinearCost()


class Bench:
    """A scheduler with a forecast, in virtual time."""

    def __init__(self, *, policy="fcfs", seqs=16, tokens=128, blocks=2048, caching=False,
                 windows=(None,), **settings):  # fmt: skip
        config = SchedulerConfig(seqs, tokens, policy=policy, **settings)
        pool = BlockPool(blocks, BLOCK, windows)
        cache = RadixPrefixCache(pool) if caching else None
        self.scheduler = make_scheduler(config, pool, 2000, COST, prefix_cache=cache)
        self.model = PagedModel(blocks, BLOCK, max_tokens=tokens, max_seqs=seqs, windows=windows)
        self.now, self.number, self.first = 0.0, 0, {}

    def add(self, prompt=200, output=20, *, slo=None, shared=0, **kind):
        """shared: how many of its tokens other requests begin with, too; the rest is its own."""
        self.number += 1
        sampling = SamplingParams(max_tokens=output)
        text = (*(1,) * shared, *(100 + self.number,) * (prompt - shared))
        request = Request(str(self.number), text, sampling, ttft_slo_ms=slo, **kind)
        (sequence,) = self.scheduler.add(request)
        return sequence

    def step(self):
        scheduled = self.scheduler.schedule()
        self.now += COST.seconds(StepShape.of(scheduled))
        for sequence, _ in self.scheduler.update(scheduled, self.model.execute(scheduled)):
            self.first.setdefault(sequence.request.request_id, self.now)

    def forecast(self, **request):
        """Seconds that a request is told to expect. It is not added."""
        with pytest.raises(DeadlineError) as caught:
            self.add(slo=1e-9, **request)
        assert caught.value.reason == "ttft_slo"
        return caught.value.retry_after

    def actual(self, **request):
        """Seconds that a request really takes to its first token, where none comes after it."""
        came, name = self.now, self.add(**request).request.request_id
        while name not in self.first:
            self.step()
        return self.first[name] - came


def test_an_idle_server_refuses_nobody():
    bench = Bench(ttft_slo_ms=1e-6)
    bench.add(slo=1e-9)
    assert bench.scheduler.backlog.requests == 1


def test_only_who_asks_is_refused():
    bench = Bench()
    for _ in range(50):
        bench.add()
    with pytest.raises(DeadlineError, match=r"first token is to be expected in \d+ ms, later than the 300 ms"):
        bench.add(slo=300)
    bench.add()
    assert bench.scheduler.backlog.requests == 51


def test_the_servers_deadline_is_for_requests_without_one():
    bench = Bench(ttft_slo_ms=300)
    for _ in range(50):
        bench.add(slo=1e6)
    with pytest.raises(DeadlineError, match="later than the 300 ms"):
        bench.add()
    bench.add(slo=1e6)


def test_who_comes_back_when_told_is_let_in():
    bench = Bench()
    for _ in range(30):
        bench.add()
    with pytest.raises(DeadlineError) as caught:
        bench.add(slo=1000)
    back = bench.now + caught.value.retry_after
    while bench.now < back:
        bench.step()
    assert bench.actual(slo=1000) < 1.5


def test_a_refused_request_leaves_nothing_behind():
    bench = Bench()
    bench.add()
    with pytest.raises(DeadlineError):
        bench.add(slo=1e-9)
    bench.scheduler.check()
    while bench.scheduler.has_work():
        bench.step()
    assert list(bench.first) == ["1"]


@pytest.mark.parametrize("seed", range(30))
def test_the_forecast_is_near_what_happens(seed):
    """First come, first served: what is ahead is known, but for how long answers will be."""
    rng = random.Random(seed)
    bench = Bench(seqs=rng.choice([4, 8, 16]))
    for _ in range(rng.randint(20, 60)):
        bench.add(rng.randint(10, 400), rng.randint(5, 60))
    for _ in range(rng.randint(20, 60)):
        bench.step()
    forecast = bench.forecast(prompt=200)
    assert 0.5 < forecast / bench.actual(prompt=200) < 2


def test_a_place_is_waited_for_where_there_is_none():
    bench = Bench(seqs=2)
    for _ in range(2):
        bench.add(prompt=10, output=500)
    for _ in range(3):
        bench.step()
    assert bench.forecast(prompt=10) == pytest.approx(bench.actual(prompt=10), rel=0.1)


def test_blocks_are_waited_for_where_there_are_none():
    bench = Bench(blocks=70)
    for _ in range(2):
        bench.add(prompt=300, output=200)
    for _ in range(8):
        bench.step()
    assert bench.forecast(prompt=600) == pytest.approx(bench.actual(prompt=600), rel=0.2)


def test_under_priorities_the_urgent_are_promised_more():
    bench = Bench(policy="priority")
    for _ in range(50):
        bench.add(priority=5)
    bench.step()
    assert bench.forecast(priority=1) < bench.forecast(priority=5) / 5
    assert bench.forecast(priority=6) == pytest.approx(bench.forecast(priority=5))


def test_under_fair_shares_the_light_are_promised_more():
    bench = Bench(policy="fair")
    for _ in range(50):
        bench.add(tenant="heavy")
    for _ in range(4):
        bench.step()
    light = bench.forecast(tenant="light")
    assert light < bench.forecast(tenant="heavy") / 5
    assert light == pytest.approx(bench.actual(tenant="light"), rel=0.5)


def crowded_by_others(bench):
    """One request of 1,600 shared tokens has been answered, and ten of others have just come."""
    bench.add(prompt=1650, output=20, shared=1600)
    while bench.scheduler.has_work():
        bench.step()
    for _ in range(10):
        bench.add(prompt=100, output=60)
    for _ in range(3):
        bench.step()


WINDOWS = pytest.mark.parametrize("windows", [(None,), (None, 100, 100)])
"""Of KV groups whose layers see so many tokens."""


@WINDOWS
def test_what_the_cache_has_of_a_request_is_not_waited_for(windows):
    bench = Bench(caching=True, windows=windows)
    crowded_by_others(bench)
    hit, miss = bench.forecast(prompt=1650, shared=1600), bench.forecast(prompt=1650)
    assert miss - hit > 1600 * COST.token
    assert hit == pytest.approx(bench.actual(prompt=1650, shared=1600, slo=1500 * hit), rel=0.5)
    assert miss == pytest.approx(bench.actual(prompt=1650), rel=0.5)


@WINDOWS
def test_what_the_cache_has_of_those_before_is_not_waited_for(windows):
    bench = Bench(caching=True, seqs=32, windows=windows)
    crowded_by_others(bench)
    for _ in range(12):
        bench.add(prompt=1650, shared=1600)
    forecast = bench.forecast(prompt=100)
    assert forecast == pytest.approx(bench.actual(prompt=100), rel=0.5)
    assert forecast < 12 * 1600 * COST.token / 4


def test_blocks_that_are_shared_are_not_waited_for():
    """Nine sequences share the 50 blocks of a beginning; room is for two that would not."""
    bench = Bench(caching=True, blocks=110)
    bench.add(prompt=820, output=200, shared=800)
    while not bench.first:
        bench.step()
    for _ in range(8):
        bench.add(prompt=820, output=200, shared=800)
    for _ in range(3):
        bench.step()
    assert bench.scheduler.num_running == 9
    assert bench.forecast(prompt=820, shared=800) == pytest.approx(bench.actual(prompt=820, shared=800), rel=0.5)


def test_a_deadline_must_be_a_time():
    with pytest.raises(RequestError, match="ttft_slo_ms must be above 0, not -1") as caught:
        Request("a", (1,), ttft_slo_ms=-1)
    assert caught.value.field == "ttft_slo_ms"
    with pytest.raises(ConfigError, match="ttft_slo_ms must be above 0"):
        SchedulerConfig(ttft_slo_ms=float("nan"))
