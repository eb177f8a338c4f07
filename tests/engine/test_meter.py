"""What is measured of requests and steps, with a clock that the test sets."""

import pytest
from gated_engine import Broken
from hypothesis import given
from hypothesis import strategies as st
from tiny_engine import handmade_engine, request

from kvarn.engine.histogram import Histogram
from kvarn.request import RequestTimes


class Clock:
    """Seconds that pass only where a test or a step says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Slow(Broken):
    """An executable whose every step takes a second."""

    clock: Clock

    def execute(self, batch, outputs=()):
        self.clock.now += 1.0
        return super().execute(batch, outputs)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make_core(clock):
    made = []

    def make(**options):
        def wrap(executable):
            made.append(Slow(executable))
            made[-1].clock = clock
            return made[-1]

        core = handmade_engine(wrap_executable=wrap, clock=clock, **options).core
        core.executable = made[-1]
        made.append(core)
        return core

    yield make
    for core in made[1::2]:
        core.close()


def last(core):
    """The last event of running a core until it has nothing left to do."""
    events = []
    while core.has_work():
        events += core.step()
    return events[-1]


def totals(core, *names):
    found = core.meter.snapshot()
    return [(found[name].count, found[name].total) for name in names]


def test_the_phases_of_a_request(make_core, clock):
    core = make_core(max_num_batched_tokens=8)
    clock.now = 12.0
    core.add(request("a", "twelve bytes", max_tokens=4), arrived=10.0)
    times = last(core).times
    assert times == RequestTimes(arrived=10.0, started=12.0, first_token=14.0, ended=17.0)
    assert (times.queue_seconds, times.prefill_seconds, times.decode_seconds) == (2.0, 2.0, 3.0)
    assert (times.inference_seconds, times.seconds) == (5.0, 7.0)
    names = [f"request_{name}_time_seconds" for name in ("queue", "prefill", "decode", "inference")]
    assert totals(core, *names, "e2e_request_latency_seconds", "time_to_first_token_seconds") == [
        (1, 2.0), (1, 2.0), (1, 3.0), (1, 5.0), (1, 7.0), (1, 4.0)
    ]  # fmt: skip
    assert totals(core, "inter_token_latency_seconds", "request_time_per_output_token_seconds") == [(3, 3.0), (1, 1.0)]
    assert totals(core, "engine_step_seconds", "iteration_tokens_total") == [(5, 5.0), (5, 12 + 3)]


def test_a_request_waits_while_others_have_the_seats(make_core):
    core = make_core(max_num_seqs=1)
    for name in "ab":
        core.add(request(name, "four", max_tokens=3))
    last(core)
    assert totals(core, "request_queue_time_seconds", "time_to_first_token_seconds") == [(2, 3.0), (2, 1.0 + 4.0)]


def test_answers_are_measured_one_by_one(make_core):
    core = make_core(max_num_seqs=1)
    core.add(request("a", "four", n=2, max_tokens=3))
    assert last(core).times == RequestTimes(0.0, 0.0, 1.0, 6.0)
    names = ("time_to_first_token_seconds", "inter_token_latency_seconds", "request_generation_tokens")
    assert totals(core, *names) == [(1, 1.0), (4, 4.0), (2, 6.0)]
    assert core.meter.ended["length"] == 2


def test_what_the_cache_had_was_not_computed(make_core):
    core = make_core(max_num_batched_tokens=64)
    for name in "ab":
        core.add(request(name, "x" * 33, max_tokens=1))
        last(core)
    assert totals(core, "request_prompt_tokens", "request_prefill_kv_computed_tokens") == [(2, 66.0), (2, 33.0 + 1)]


def test_a_request_that_is_broken_off(make_core):
    core = make_core()
    core.add(request("a", "four", n=2, max_tokens=9))
    core.step()
    core.add(request("b", "four", max_tokens=9))
    assert core.abort("a").times == RequestTimes(0.0, 0.0, 1.0, 1.0)
    assert core.abort("b").times == RequestTimes(1.0, None, None, 1.0)
    assert core.meter.ended == {"stop": 0, "length": 0, "abort": 3, "error": 0}
    assert totals(core, "e2e_request_latency_seconds", "request_generation_tokens") == [(0, 0.0), (0, 0.0)]
    assert not core.meter._unstarted


def test_a_step_that_fails_ends_its_requests_with_an_error(make_core):
    core = make_core()
    core.add(request("a", "four", n=2, max_tokens=9))
    core.executable.failures = 1
    with pytest.raises(RuntimeError):
        core.step()
    core.reset()
    assert core.meter.ended["error"] == 2
    core.add(request("a", "four", max_tokens=2))
    assert last(core).times.queue_seconds == 0.0
    assert core.meter.ended["length"] == 1


@given(st.lists(st.floats(0, 20)), st.lists(st.floats(0, 20), unique=True))
def test_a_bucket_has_what_is_above_the_last_bound_and_up_to_its_own(values, bounds):
    bounds = tuple(sorted(bounds))
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    found = histogram.snapshot()
    assert found.total == pytest.approx(sum(values))
    assert found.count == len(values)
    for place, bound in enumerate(bounds):
        assert sum(found.counts[: place + 1]) == sum(value <= bound for value in values)
