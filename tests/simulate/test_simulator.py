"""The simulator: small cases by hand, nothing lost in large ones, and the same schedule as the engine's."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import handmade_engine

from kvarn.config import POLICIES
from kvarn.errors import ConfigError
from kvarn.request import Request, SamplingParams
from kvarn.scheduler import NullObserver, StepShape
from kvarn.scheduler.fitted_cost import FittedStepCost
from kvarn.simulate import Arrival, Settings, Synthetic, make_traffic, simulate
from kvarn.simulate.batching import BATCHINGS
from kvarn.simulate.simulator import PromptMaker

ONE_SECOND = FittedStepCost((1, 2), (1.0, 1.0), 0.0, 0.0, 0.0)
COST = FittedStepCost((1, 8, 64), (0.01, 0.02, 0.1), 1e-4, 1e-6, 2e-6)
SMALL = Settings(num_blocks=64, max_model_len=256, max_num_seqs=4, max_num_batched_tokens=32)


class Watching(NullObserver):
    """Keeps every step; and an observer makes the simulator take each one by itself."""

    def __init__(self):
        self.steps = []

    def stepped(self, scheduled, times):
        self.steps.append(scheduled)


def of(percentiles):
    return percentiles[50], percentiles[99]


def test_one_request_step_by_step():
    run = simulate([Arrival(0.0, 10, 3)], SMALL, ONE_SECOND)
    assert (run.steps, run.duration, run.tokens_per_s) == (4, 3.0, 1.0)
    assert (of(run.ttft), of(run.itl), of(run.e2e)) == ((1, 1), (1, 1), (3, 3))
    assert (run.utilization, run.mean_batch) == (1.0, 1.0)


def test_a_prompt_longer_than_a_step_takes_several():
    run = simulate([Arrival(0.0, 70, 1)], SMALL, ONE_SECOND)
    assert (run.duration, run.ttft[50], run.itl) == (3.0, 3.0, None)


def test_who_comes_during_a_step_joins_the_next():
    run = simulate([Arrival(0.0, 10, 3), Arrival(0.5, 10, 3)], SMALL, ONE_SECOND)
    # Steps end at 1, 2, 3, 4: the first has tokens at 1, 2, 3, the second at 2, 3, 4.
    assert run.duration == 4.0
    assert (run.ttft[50], run.ttft[99]) == (1.0, 1.5)
    assert run.mean_batch == 1.5


def test_between_requests_nothing_runs():
    run = simulate([Arrival(0.0, 10, 1), Arrival(9.0, 10, 1)], SMALL, ONE_SECOND)
    assert (run.duration, run.utilization) == (10.0, 0.2)


def test_static_batching_waits_for_a_full_batch_and_for_its_end():
    traffic = [Arrival(0.0, 8, 1), Arrival(3.0, 8, 5), Arrival(3.5, 8, 1)]
    run = simulate(traffic, dataclasses.replace(SMALL, batching="static", max_num_seqs=2), ONE_SECOND)
    # The batch of two begins at 3 and ends at 8; the last, alone, has its token at 9.
    assert (run.duration, run.ttft[99], run.ttft[50]) == (9.0, 5.5, 4.0)


def test_dynamic_batching_waits_no_longer_than_its_window():
    traffic = [Arrival(0.0, 8, 1), Arrival(1.0, 8, 1), Arrival(10.0, 8, 1)]
    run = simulate(traffic, dataclasses.replace(SMALL, batching="dynamic", window=2.0), ONE_SECOND)
    # The first two begin together at 2; of the last it is known that nobody comes after it.
    assert (run.ttft[99], run.ttft[50], run.duration) == (3.0, 2.0, 11.0)


def test_what_a_group_shares_is_computed_once():
    traffic = [Arrival(float(5 * n), 48, 1, prefix_group="g", prefix_tokens=40) for n in range(3)]
    run = simulate(traffic, SMALL, ONE_SECOND)
    # Two steps for the first prompt; the others have 40 of theirs in the cache, but for what is in no whole block.
    assert run.hit_rate == pytest.approx(2 * 40 / (3 * 48))
    assert (run.steps, run.ttft[50], run.ttft[99]) == (2 + 1 + 1 + 3, 1.0, 2.0)
    without = simulate(traffic, dataclasses.replace(SMALL, prefix_cache=False), ONE_SECOND)
    assert (without.hit_rate, without.ttft[50]) == (0.0, 2.0)
    strangers = [dataclasses.replace(arrival, tenant=str(n)) for n, arrival in enumerate(traffic)]
    assert simulate(strangers, SMALL, ONE_SECOND).hit_rate == 0.0


def test_what_was_computed_before_a_preemption_is_found_or_counted_as_computed_again():
    traffic = [Arrival(0.0, 16, 40), Arrival(0.0, 16, 40)]
    kept = simulate(traffic, dataclasses.replace(SMALL, num_blocks=5), ONE_SECOND)
    lost = simulate(traffic, dataclasses.replace(SMALL, num_blocks=5, prefix_cache=False), ONE_SECOND)
    assert kept.preemptions == lost.preemptions == 1
    assert kept.recomputed_tokens < lost.recomputed_tokens


PER_TOKEN = FittedStepCost((1, 2), (1.0, 2.0), 0.0, 0.0, 0.0)
"""A second for each token."""


@pytest.mark.parametrize(("bandwidth", "loaded", "waited"), [(16e3, 80, 6.0), (1e3, 0, 81.0)])
def test_what_was_evicted_is_loaded_where_that_takes_less(bandwidth, loaded, waited):
    """Each of two texts fills the cache: the first is evicted for the second, and comes again."""
    traffic = [Arrival(500.0 * n, 81, 1, "", group, 80) for n, group in enumerate("ghg")]
    server = dataclasses.replace(SMALL, num_blocks=6, max_model_len=96, kv_bytes_per_token=1000,
                                 kv_offload_bytes=1 << 20, kv_move_bandwidth=bandwidth)  # fmt: skip
    run = simulate(traffic, server, PER_TOKEN)
    assert run.loaded_tokens == loaded
    assert (run.saved_tokens > 0) == (loaded > 0)
    saves = run.saved_tokens // 16
    # Whoever evicts waits for the saves, of a second each.
    assert run.duration == 1000.0 + waited + saves - (5 if loaded else 0)
    none = simulate(traffic, dataclasses.replace(server, kv_offload_bytes=0), PER_TOKEN)
    assert (none.loaded_tokens, none.saved_tokens, none.duration) == (0, 0, 1081.0)


def test_who_would_come_too_late_is_refused_and_counted():
    traffic = [Arrival(0.0, 20, 5)] * 12
    slow = simulate(traffic, SMALL, COST)
    run = simulate(traffic, dataclasses.replace(SMALL, ttft_slo_ms=150.0), COST)
    assert 0 < run.late == run.refused < 11
    assert run.finished == 12 - run.late
    assert run.ttft[99] < 0.3 < slow.ttft[99]
    assert (slow.refused, slow.late) == (0, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kv_offload_bytes": 1 << 20}, "kv_bytes_per_token must be given"),
        ({"kv_offload_bytes": 1 << 20, "kv_bytes_per_token": 9}, "kv_move_bandwidth must be given"),
        ({"kv_offload_bytes": 99, "kv_bytes_per_token": 9, "kv_move_bandwidth": 1.0}, "has no room for a block"),
        ({"kv_offload_bytes": 1, "prefix_cache": False}, "prefix_cache must be true"),
        ({"ttft_slo_ms": 1.0, "batching": "static"}, "ttft_slo_ms is for continuous batching"),
        ({"ttft_slo_ms": -1.0}, "ttft_slo_ms must be at least 0"),
        ({"kv_move_bandwidth": float("nan")}, "kv_move_bandwidth must be at least 0"),
    ],
)
def test_a_tier_or_a_deadline_that_cannot_be_is_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        simulate([Arrival(0.0, 10, 3)], dataclasses.replace(SMALL, **wrong), COST)


def test_a_target_between_tokens_makes_chunks_smaller():
    traffic = [Arrival(0.0, 8, 60), Arrival(0.1, 200, 1)]
    server = dataclasses.replace(SMALL, max_num_batched_tokens=64)
    longest = {target: simulate(traffic, dataclasses.replace(server, itl_target_ms=target), COST).itl[99]
               for target in (0.0, 50.0)}  # fmt: skip
    assert longest[50.0] <= 0.05 < longest[0.0]


def test_a_small_cache_preempts_and_computes_again():
    traffic = [Arrival(0.0, 16, 40), Arrival(0.0, 16, 40)]
    run = simulate(traffic, dataclasses.replace(SMALL, num_blocks=4), ONE_SECOND)
    assert run.finished == 2
    assert run.preemptions == 1
    assert run.recomputed_tokens > 0


def test_what_never_fits_is_refused_and_the_others_go_on():
    run = simulate([Arrival(0.0, 300, 3), Arrival(0.0, 10, 3)], SMALL, ONE_SECOND)
    assert (run.refused, run.finished) == (1, 1)
    nothing = simulate([Arrival(0.0, 300, 3)], SMALL, ONE_SECOND)
    assert (nothing.refused, nothing.finished, nothing.ttft, nothing.tokens_per_s) == (1, 0, None, 0.0)


def test_fairness_is_of_tenants_with_requests_all_the_time():
    traffic = [Arrival(0.0, 8, 100, tenant) for tenant in ("a", "b", "b", "b")]
    run = simulate(traffic, SMALL, ONE_SECOND)
    # In each window b has three tokens to a's one: (1 + 3)² / (2 · (1 + 9)).
    assert run.fairness.jain == pytest.approx(0.8)
    assert run.fairness.max_to_min == pytest.approx(3.0)
    assert run.tenants["b"]["output_tokens"] == 300
    assert simulate(traffic[1:], SMALL, ONE_SECOND).fairness is None


def test_equal_prefixes_are_those_that_are_said_to_be():
    prompts = PromptMaker()
    first = prompts.prompt(Arrival(0, 10, 1, "", "g", 6))
    second = prompts.prompt(Arrival(0, 12, 1, "", "g", 8))
    other, own = prompts.prompt(Arrival(0, 10, 1, "", "h", 6)), prompts.prompt(Arrival(0, 10, 1))
    assert [len(prompt) for prompt in (first, second, other, own)] == [10, 12, 10, 10]
    assert first[:6] == second[:6] and first[6] != second[6]
    assert len({prompt[0] for prompt in (first, other, own, prompts.prompt(Arrival(0, 10, 1)))}) == 4
    turn = Arrival(0, 20, 4, "", "chat", 20)
    answered = (*prompts.prompt(turn), *[prompts.answer(turn)] * 4)
    assert prompts.prompt(Arrival(1, 30, 1, "", "chat", 30))[:24] == answered


@st.composite
def arrival(draw):
    """Some are the next turns of conversations: all of their prompts is their group's."""
    prompt, group = draw(st.integers(1, 90)), draw(st.sampled_from(["", "g", "h"]))
    shared = draw(st.one_of(st.integers(0, prompt), st.just(prompt))) if group else 0
    return Arrival(draw(st.floats(0, 3)), prompt, draw(st.integers(1, 60)), draw(st.sampled_from("ab")), group, shared)


arrivals = st.lists(arrival(), min_size=1, max_size=25).map(
    lambda several: sorted(several, key=lambda arrival: arrival.time)
)


def server_of(cache_tokens, block_size, windowed_groups, **settings):
    num_blocks = cache_tokens // block_size * (1 + windowed_groups)
    return Settings(num_blocks=num_blocks, block_size=block_size, windowed_groups=windowed_groups, **settings)


servers = st.builds(
    server_of,
    batching=st.sampled_from(BATCHINGS),
    policy=st.sampled_from(POLICIES),
    cache_tokens=st.integers(160, 640),
    max_model_len=st.just(150),
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(6, 50),
    block_size=st.sampled_from([4, 16]),
    prefix_cache=st.booleans(),
    itl_target_ms=st.sampled_from([0.0, 20.0, 60.0]),
    windowed_groups=st.sampled_from([0, 0, 1, 2]),
    sliding_window=st.integers(1, 60),
)


def with_tier_or_deadline(server, tier_blocks, bandwidth, slo):
    tier = {"kv_offload_bytes": tier_blocks * (16 * 100 + 72) + 8192, "kv_bytes_per_token": 100} if tier_blocks else {}
    slo = slo if server.batching == "continuous" else 0.0
    tier = tier if server.prefix_cache else {}
    return dataclasses.replace(server, **tier, kv_move_bandwidth=bandwidth, ttft_slo_ms=slo)


pressed_servers = st.builds(
    with_tier_or_deadline, servers, st.sampled_from([0, 3, 50]), st.sampled_from([1e6, 2e5]),
    st.sampled_from([0.0, 50.0, 500.0]),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(arrivals, pressed_servers)
def test_every_request_ends_with_all_its_tokens_skipping_or_not(traffic, server):
    run = simulate(traffic, server, COST)
    assert run.finished + run.late == run.requests == len(traffic)
    assert run.refused == run.late
    if not server.ttft_slo_ms:
        assert run.output_tokens == sum(arrival.output_tokens for arrival in traffic)
        assert run.prompt_tokens == sum(arrival.prompt_tokens for arrival in traffic)
        assert run.late == 0
    assert run.recomputed_tokens >= 0
    assert (run.preemptions == 0) <= (run.recomputed_tokens == 0)
    watch = same_one_by_one(run, traffic, server)
    assert max(step.num_tokens for step in watch.steps) <= server.max_num_batched_tokens


def same_one_by_one(run, traffic, server):
    """Asserts that a run is what it is without skipping; returns who watched that."""
    watch = Watching()
    one_by_one = simulate(traffic, server, COST, observer=watch)
    rounded = {"utilization": 0, "mean_batch": 0}
    assert dataclasses.replace(run, **rounded) == dataclasses.replace(one_by_one, **rounded)
    assert run.utilization == pytest.approx(one_by_one.utilization)
    assert run.mean_batch == pytest.approx(one_by_one.mean_batch)
    assert len(watch.steps) == run.steps
    return watch


turns = st.lists(
    st.tuples(st.floats(0, 2), st.integers(1, 60), st.integers(10, 80), st.sampled_from("gggh")),
    min_size=3,
    max_size=20,
)


@settings(max_examples=150, deadline=None)
@given(turns, st.integers(24, 50), st.integers(2, 6), st.integers(0, 1))
def test_answers_that_others_find_are_found_as_early_when_skipping(turns, num_blocks, seqs, windowed):
    """All is shared, and little fits: blocks become one with others', and what is evicted depends on when."""
    traffic = [Arrival(time, prompt, output, "", group, prompt) for time, prompt, output, group in sorted(turns)]
    server = Settings(
        num_blocks=num_blocks * (1 + windowed), block_size=6, max_model_len=144, max_num_seqs=seqs,
        max_num_batched_tokens=32, windowed_groups=windowed, sliding_window=15,
    )  # fmt: skip
    run = simulate(traffic, server, COST)
    assert run.finished == len(traffic)
    same_one_by_one(run, traffic, server)


def test_long_decodes_are_skipped():
    calls = []

    class Counting(FittedStepCost):
        def seconds(self, shape: StepShape) -> float:
            calls.append(shape)
            return super().seconds(shape)

    counting = Counting(COST.knots, COST.at_knots, COST.per_sampled, COST.per_attended, COST.per_context)
    run = simulate([Arrival(0.0, 10, 200), Arrival(0.0, 10, 200)], SMALL, counting)
    assert run.steps > 200 and len(calls) < 10


class Clock:
    """An engine's clock that moves with the cost of its steps, as the simulator's does."""

    def __init__(self):
        self.now = 0.0


@pytest.mark.parametrize(("family", "policy"), [("llama", "fcfs"), ("llama", "fair"), ("gemma3_text", "fcfs")])
@pytest.mark.parametrize("groups", [0, 1])
@pytest.mark.parametrize("few", [False, True])
def test_the_engine_takes_the_same_steps_at_the_same_times(few, groups, family, policy):
    traffic = make_traffic(
        Synthetic("burst", 30.0, 40, 30, 20, tenants=2, prefix_groups=groups, prefix_tokens=24 * (groups > 0), seed=5)
    )
    traffic = [dataclasses.replace(a, prompt_tokens=min(a.prompt_tokens, 90), output_tokens=min(a.output_tokens, 60))
               for a in traffic]  # fmt: skip
    windowed = int(family == "gemma3_text")
    num_blocks = (17 + groups if windowed else 12) if few else 64 * (1 + windowed)
    server = dataclasses.replace(SMALL, num_blocks=num_blocks, max_model_len=160, policy=policy,
                                 windowed_groups=windowed, sliding_window=24)  # fmt: skip
    watch = Watching()
    run = simulate(traffic, server, COST, observer=watch)
    engine = handmade_engine(
        num_blocks=num_blocks, max_model_len=160, max_num_seqs=4, max_num_batched_tokens=32, policy=policy,
        family=family,
    )  # fmt: skip
    prompts = PromptMaker()
    core, taken, now, left = engine.core, [], 0.0, list(enumerate(traffic))
    core._observer = watcher = Watching()
    first_tokens = {}
    try:
        while left or core.has_work():
            while left and left[0][1].time <= now:
                index, arrival = left.pop(0)
                sampling = SamplingParams(temperature=0.0, max_tokens=arrival.output_tokens, ignore_eos=True)
                core.add(Request(str(index), prompts.prompt(arrival), sampling, tenant=arrival.tenant))
            if not core.has_work():
                now = max(now, left[0][1].time)
                continue
            events = core.step()
            taken.append(watcher.steps[-1])
            now += COST.seconds(StepShape.of(taken[-1])) if taken[-1].sequences else 0.0
            for event in events:
                first_tokens.setdefault(event.request_id, now)
    finally:
        core.close()
    assert [shape_of(step) for step in taken] == [shape_of(step) for step in watch.steps]
    waits = sorted(first_tokens[str(index)] - arrival.time for index, arrival in enumerate(traffic))
    assert run.ttft[99] == waits[-1]
    assert run.preemptions == core.stats().preemptions
    assert (run.hit_rate > 0) == (groups > 0)
    assert few == (run.preemptions > 0)


def shape_of(step):
    parts = [(p.sequence_id, p.start, len(p.token_ids), p.block_tables, p.sample) for p in step.sequences]
    return parts, [new.sequence_id for new in step.new], step.finished, step.block_copies
