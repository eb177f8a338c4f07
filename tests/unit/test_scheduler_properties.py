"""Whatever comes in whatever order: no block is lost, every limit holds, and everybody says what they say alone."""

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from paged_model import VOCAB, PagedModel, expected_tokens

from kvarn.cache import BlockPool, NullPrefixCache
from kvarn.config import SchedulerConfig
from kvarn.errors import QueueFullError, RequestError
from kvarn.request import FinishReason, Request, SamplingParams
from kvarn.scheduler import FairShare, FirstComeFirstServed, PriorityClasses, Scheduler

BLOCK = 4
ENDS = frozenset({0, 1})


class DictPrefixCache:
    """The plainest prefix cache: a dict from the tokens up to a block's end to the block. Oldest out first."""

    def __init__(self, pool):
        self.pool = pool
        self.blocks = {}

    def match(self, token_ids):
        found = []
        while (block := self.blocks.get(tuple(token_ids[: BLOCK * (len(found) + 1)]))) is not None:
            if BLOCK * (len(found) + 1) > len(token_ids):
                break
            found.append(block)
        return found

    def insert(self, token_ids, blocks):
        for index in range(len(token_ids) // BLOCK):
            key = tuple(token_ids[: BLOCK * (index + 1)])
            if key not in self.blocks:
                self.pool.share([blocks[index]])
                self.blocks[key] = blocks[index]

    def evict(self, count):
        before = self.pool.num_free
        while self.blocks and self.pool.num_free < before + count:
            self.pool.free([self.blocks.pop(next(iter(self.blocks)))])
        return self.pool.num_free - before


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, aborts and steps at random under random limits, and remembers what everybody must say."""

    prefix_cache = NullPrefixCache
    policy = FirstComeFirstServed

    @initialize(
        blocks=st.integers(4, 24), seqs=st.integers(1, 6), spare_tokens=st.integers(0, 20), queue=st.integers(1, 6)
    )
    def start(self, blocks, seqs, spare_tokens, queue):
        tokens = seqs + spare_tokens
        self.pool = BlockPool(blocks, BLOCK)
        self.cache = DictPrefixCache(self.pool) if self.prefix_cache is DictPrefixCache else NullPrefixCache()
        self.model = PagedModel(blocks, BLOCK, max_tokens=tokens, max_seqs=seqs)
        self.queue = queue
        config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_num_queued_requests=queue)
        self.scheduler = Scheduler(
            config, self.pool, 60, eos_token_ids=ENDS, policy=self.policy(), prefix_cache=self.cache
        )
        self.sequences = []
        self.said = {}
        self.number = 0

    @rule(
        # Few different prompts, so that prefixes are shared.
        length=st.integers(0, 40),
        first=st.integers(0, 2),
        max_tokens=st.integers(1, 30) | st.none(),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        ignore_eos=st.booleans(),
        min_tokens=st.integers(0, 1),
        tenant=st.sampled_from(["", "a", "b"]),
        priority=st.integers(-2, 2),
    )
    def add(self, length, first, max_tokens, n, ignore_eos, min_tokens, tenant, priority):
        sampling = SamplingParams(max_tokens=max_tokens, n=n, ignore_eos=ignore_eos, min_tokens=min_tokens)
        prompt = tuple((first + i) % VOCAB for i in range(length))
        self.number += 1
        try:
            priority *= self.policy is PriorityClasses
            sequences = self.scheduler.add(Request(str(self.number), prompt, sampling, priority, tenant))
        except QueueFullError:
            assert self.scheduler.num_queued == self.queue
        except RequestError:
            limit = min(60, self.pool.num_blocks * BLOCK)
            assert length == 0 or length >= limit or length + max(max_tokens or 0, min_tokens) > limit
        else:
            self.sequences += sequences
            self.said |= {s.sequence_id: [] for s in sequences}

    @rule(data=st.data())
    def abort(self, data):
        names = sorted({s.request.request_id for s in self.sequences if not s.finished})
        if names:
            self.scheduler.abort(data.draw(st.sampled_from(names)))

    @rule(data=st.data())
    def finish(self, data):
        live = [s for s in self.sequences if not s.finished and s.num_output_tokens]
        if live:
            self.scheduler.finish(data.draw(st.sampled_from(live)).sequence_id, FinishReason.STOP, "word")

    @rule(steps=st.integers(1, 8))
    def steps(self, steps):
        for _ in range(steps):
            self.one_step()

    @precondition(lambda self: self.scheduler.has_work())
    @rule(data=st.data())
    def abort_within_a_step(self, data):
        scheduled = self.scheduler.schedule()
        self.abort(data)
        self.book(scheduled)

    def one_step(self):
        self.book(self.scheduler.schedule())

    def book(self, scheduled):
        for sequence, token in self.scheduler.update(scheduled, self.model.execute(scheduled)):
            self.said[sequence.sequence_id].append(token.token_id)
        self.books_agree()

    @invariant()
    def books_agree(self):
        held = [self.cache.blocks.values()] if isinstance(self.cache, DictPrefixCache) else []
        self.scheduler.check(held)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        # Alone each request takes at most 60 steps; nobody starves when all together take no more than the sum.
        for _ in range(100 + 70 * len(self.sequences)):
            if not self.scheduler.has_work():
                break
            self.one_step()
        assert not self.scheduler.has_work(), "somebody never ends"
        for sequence in self.sequences:
            self.check_what_was_said(sequence)
        self.cache.evict(self.pool.num_blocks)
        assert self.pool.num_free == self.pool.num_blocks
        assert not self.model.streams, "the runner was told of every end"

    def check_what_was_said(self, sequence):
        said = self.said[sequence.sequence_id]
        expected = expected_tokens(
            sequence.request.prompt_token_ids,
            sequence.index,
            max_length=sequence.max_length,
            ends=sequence.eos_token_ids,
            min_tokens=sequence.sampling.min_tokens,
        )
        if sequence.finish_reason is FinishReason.ABORT or sequence.stop_reason == "word":
            assert said == expected[: len(said)]
        else:
            assert said == expected


class WithPrefixCache(SchedulerMachine):
    """The same through the prefix cache's seam."""

    prefix_cache = DictPrefixCache


class LastComeFirstServed(FirstComeFirstServed):
    """A policy under which a newcomer overtakes everybody."""

    def place(self, sequence):
        return (-sequence.arrival, sequence.index)


class WithAnotherPolicy(SchedulerMachine):
    """The same through the policy's seam."""

    policy = LastComeFirstServed


class WithPriorities(WithPrefixCache):
    """Some overtake others."""

    policy = PriorityClasses


class WithTenants(WithPrefixCache):
    """The order changes with every token."""

    policy = FairShare


@pytest.mark.parametrize(
    "machine", [SchedulerMachine, WithPrefixCache, WithAnotherPolicy, WithPriorities, WithTenants]
)
def test_any_order_of_requests_aborts_and_steps(machine):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
