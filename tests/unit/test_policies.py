"""Who is served first under each policy, and that nobody is forgotten."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from paged_model import PagedModel

from kvarn.cache import BlockPool
from kvarn.config import POLICIES, SchedulerConfig
from kvarn.errors import ConfigError, RequestError
from kvarn.request import Request, SamplingParams
from kvarn.scheduler import FairShare, FirstComeFirstServed, PriorityClasses, Scheduler, make_policy
from kvarn.scheduler.fairness import OUTPUT_WEIGHT, PROMPT_WEIGHT

BLOCK = 4


class Bench:
    """A scheduler and a model, stepped by hand."""

    def __init__(self, policy, *, blocks=64, seqs=8, tokens=32, max_model_len=100):
        self.model = PagedModel(blocks, BLOCK, max_tokens=tokens, max_seqs=seqs)
        config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_num_queued_requests=10_000)
        self.scheduler = Scheduler(config, BlockPool(blocks, BLOCK), max_model_len, policy=policy)
        self.names = {}
        self.sequences = {}

    def add(self, name, tokens=4, *, tenant="", priority=0, **sampling):
        request = Request(name, tuple(range(tokens)), SamplingParams(**sampling), priority, tenant)
        sequences = self.scheduler.add(request)
        self.names |= {s.sequence_id: name for s in sequences}
        self.sequences[name] = sequences[0]

    def step(self):
        """The names of those that take part, in order, and what each computes."""
        scheduled = self.scheduler.schedule()
        self.scheduler.update(scheduled, self.model.execute(scheduled))
        self.scheduler.check()
        return {self.names[part.sequence_id]: len(part.token_ids) for part in scheduled.sequences}

    def firsts(self):
        """Names in the order in which they first took part, until all is done."""
        order = []
        while self.scheduler.has_work():
            order += [name for name in self.step() if name not in order]
        return order


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_goes_by_its_name(name):
    assert make_policy(name).name == name
    SchedulerConfig(policy=name)


def test_an_unknown_policy_is_refused():
    with pytest.raises(ConfigError, match="policy must be one of fcfs, priority, fair, not 'lottery'"):
        SchedulerConfig(policy="lottery")


@pytest.mark.parametrize("policy", [FirstComeFirstServed(), FairShare()])
def test_a_priority_is_refused_by_who_would_ignore_it(policy):
    with pytest.raises(RequestError, match=f"not 3.*policy is {policy.name}") as caught:
        Bench(policy).add("a", priority=3)
    assert caught.value.field == "priority"


@pytest.mark.parametrize("priority", [2**31, -(2**31) - 1])
def test_priorities_have_a_range(priority):
    bench = Bench(PriorityClasses())
    with pytest.raises(RequestError, match=f"between -2147483648 and 2147483647, not {priority}"):
        bench.add("a", priority=priority)
    bench.add("a", priority=2**31 - 1)
    bench.add("b", priority=-(2**31))


def test_smaller_priorities_are_served_first_and_ties_by_arrival():
    bench = Bench(PriorityClasses(), seqs=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -1), ("e", 0)):
        bench.add(name, priority=priority, max_tokens=2)
    assert bench.firsts() == ["d", "b", "e", "a", "c"]


def test_a_long_prompt_does_not_hold_up_a_smaller_priority():
    bench = Bench(PriorityClasses(), tokens=8)
    bench.add("long", 40, priority=5, max_tokens=1)
    assert bench.step() == {"long": 8}
    bench.add("same", 4, priority=5, max_tokens=9)
    bench.add("urgent", 4, priority=1, max_tokens=9)
    assert bench.step() == {"urgent": 4, "long": 4}
    assert bench.step() == {"urgent": 1, "long": 7}


def test_the_largest_priority_is_preempted():
    bench = Bench(PriorityClasses(), blocks=8, tokens=32, max_model_len=32)
    bench.add("later", 8, priority=1, max_tokens=20)
    bench.add("sooner", 8, priority=0, max_tokens=20)
    while not bench.scheduler.num_preemptions:
        assert set(bench.step()) >= {"sooner"}
    assert bench.sequences["later"].num_computed_tokens == 0
    bench.firsts()
    assert all(s.num_output_tokens == 20 for s in bench.sequences.values())


def test_the_tenant_with_the_least_service_goes_first():
    bench = Bench(FairShare(), seqs=1)
    for number in range(4):
        bench.add(f"a{number}", 10, tenant="a", max_tokens=1)
    for number in range(8):
        bench.add(f"b{number}", 5, tenant="b", max_tokens=1)
    # A request of a costs 10 + 2, one of b 5 + 2.
    assert bench.firsts() == ["a0", "b0", "b1", "a1", "b2", "b3", "a2", "b4", "b5", "a3", "b6", "b7"]


def test_an_output_token_counts_as_two_prompt_tokens():
    bench = Bench(FairShare(), seqs=1, tokens=64)
    bench.add("a0", 1, tenant="a", max_tokens=10)
    bench.add("b0", 20, tenant="b", max_tokens=1)
    bench.add("a1", 1, tenant="a", max_tokens=1)
    bench.add("b1", 1, tenant="b", max_tokens=1)
    # After their firsts a stands at 21 and b at 22.
    assert bench.firsts() == ["a0", "b0", "a1", "b1"]
    assert (PROMPT_WEIGHT, OUTPUT_WEIGHT) == (1, 2)


def test_idleness_earns_no_credit():
    bench = Bench(FairShare(), seqs=1)
    for number in range(12):
        bench.add(f"a{number}", 10, tenant="a", max_tokens=1)
    for _ in range(6):
        bench.step()
    for number in range(4):
        bench.add(f"b{number}", 10, tenant="b", max_tokens=1)
    assert bench.firsts()[:6] == ["b0", "a6", "a7", "b1", "a8", "b2"], "first among equals, but not four times"


def test_who_comes_to_an_empty_queue_is_lifted_to_who_left_it_last():
    policy = FairShare()
    bench = Bench(policy, seqs=1)
    bench.add("a0", 30, tenant="a", max_tokens=1)
    bench.step()
    bench.add("b0", 10, tenant="b", max_tokens=1)
    assert policy.rank("a") == 32
    assert 31 < policy.rank("b") < 32, "and goes first among equals"


def test_within_a_tenant_and_for_one_tenant_it_is_first_come_first_served():
    bench = Bench(FairShare(), seqs=1)
    for number, size in enumerate((30, 2, 14, 3)):
        bench.add(str(number), size, max_tokens=number + 1)
    assert bench.firsts() == list("0123")


def test_the_tenant_with_the_most_service_is_preempted():
    bench = Bench(FairShare(), blocks=8, tokens=32, max_model_len=32)
    bench.add("greedy", 10, tenant="a", max_tokens=20)
    bench.step()
    bench.add("modest", 8, tenant="b", max_tokens=20)
    bench.scheduler.policy.charge_prompt("a", 1000)
    while not bench.scheduler.num_preemptions:
        assert "modest" in bench.step()
    assert bench.sequences["greedy"].num_computed_tokens == 0
    bench.firsts()
    assert all(s.num_output_tokens == 20 for s in bench.sequences.values())


def test_a_long_prompt_does_not_hold_up_a_tenant_with_less_service():
    bench = Bench(FairShare(), tokens=8)
    bench.add("short", 4, tenant="a", max_tokens=1)
    bench.add("long", 40, tenant="a", max_tokens=1)
    assert bench.step() == {"short": 4, "long": 4}
    bench.add("other", 12, tenant="b", max_tokens=2)
    bench.add("next", 4, tenant="a", max_tokens=2)
    assert bench.step() == {"other": 7, "long": 1}
    assert bench.step() == {"other": 5, "long": 3}, "its own tokens do not set it back"
    assert bench.step() == {"other": 1, "long": 7}


def test_counters_of_tenants_that_left_are_bounded_and_the_largest_are_kept():
    policy = FairShare(max_tenants=10)
    bench = Bench(policy, seqs=1)
    bench.add("greedy", 90, tenant="greedy", max_tokens=1)
    bench.firsts()
    for number in range(300):
        bench.add(str(number), 1, tenant=f"tenant {number}", max_tokens=1)
        bench.firsts()
    assert policy.num_tenants <= 21
    policy = FairShare(max_tenants=10)
    for number in range(300):
        policy.open(f"tenant {number}")
        policy.charge_prompt(f"tenant {number}", 1000 if number == 5 else 1)
    for number in range(300):
        policy.close(f"tenant {number}")
    assert policy.num_tenants <= 21
    assert policy.rank("tenant 5") == 1001, "who got most is not forgiven"


def test_the_cost_of_a_step_does_not_grow_with_those_who_wait():
    class Counting(FairShare):
        calls = 0

        def rank(self, lane):
            self.calls += 1
            return super().rank(lane)

    def calls(waiting):
        policy = Counting()
        bench = Bench(policy, seqs=2, max_model_len=40)
        for number in range(waiting):
            bench.add(str(number), 4, tenant="ab"[number % 2], max_tokens=9)
        before = policy.calls
        for _ in range(30):
            bench.step()
        return policy.calls - before

    assert calls(1000) == calls(20)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_between_backlogged_tenants_the_service_differs_by_a_bounded_amount(data):
    """Theorem 4.4 of Sheng et al. 2024, over every interval of a run in which all of them always wait."""
    tenants = "abc"[: data.draw(st.integers(2, 3))]
    blocks, tokens = data.draw(st.integers(8, 30)), data.draw(st.integers(8, 40))
    bench = Bench(FairShare(), blocks=blocks, seqs=data.draw(st.integers(1, 8)), tokens=tokens, max_model_len=32)
    kinds = {t: (data.draw(st.integers(1, 20)), data.draw(st.integers(1, 12))) for t in tenants}
    backlog = {t: [] for t in tenants}
    service, history, number = dict.fromkeys(tenants, 0), [], 0
    for _ in range(150):
        for tenant, (prompt, output) in kinds.items():
            backlog[tenant] = [s for s in backlog[tenant] if not s.announced]
            while len(backlog[tenant]) < 12:
                number += 1
                bench.add(str(number), prompt, tenant=tenant, max_tokens=output)
                backlog[tenant].append(bench.sequences[str(number)])
        scheduled = bench.scheduler.schedule()
        for sequence, _ in bench.scheduler.update(scheduled, bench.model.execute(scheduled)):
            prompt = sequence.num_prompt_tokens if sequence.num_output_tokens == 1 else 0
            service[sequence.request.tenant] += PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT
        history.append(dict(service))
    longest = max(prompt for prompt, _ in kinds.values())
    bound = 2 * max(PROMPT_WEIGHT * longest, OUTPUT_WEIGHT * blocks * BLOCK)
    for first in tenants:
        for second in tenants:
            gaps = [entry[first] - entry[second] for entry in history]
            assert max(gaps) - min(gaps) <= bound
