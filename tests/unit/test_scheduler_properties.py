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
from virtual_time import LinearCost

from kvarn.cache import BlockPool, NullPrefixCache, OffloadIndex, RadixPrefixCache
from kvarn.config import SchedulerConfig
from kvarn.errors import QueueFullError, RequestError
from kvarn.request import FinishReason, Request, SamplingParams
from kvarn.scheduler import (
    ConstantBudget,
    FairShare,
    FirstComeFirstServed,
    ItlBudget,
    MoveCost,
    PriorityClasses,
    Scheduler,
)

BLOCK = 4
ENDS = frozenset({0, 1})


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, aborts and steps at random under random limits, and remembers what everybody must say."""

    shared_prefixes: tuple[tuple[int, ...], ...] | None = None
    """None: no prefix cache."""
    tier_slots = 0
    windows: tuple[int | None, ...] = (None,)
    """Of the KV groups."""
    policy = FirstComeFirstServed
    budget = ConstantBudget

    @initialize(
        blocks=st.integers(4, 24), seqs=st.integers(1, 6), spare_tokens=st.integers(0, 20), queue=st.integers(1, 6)
    )
    def start(self, blocks, seqs, spare_tokens, queue):
        tokens, blocks = seqs + spare_tokens, blocks * len(self.windows)
        self.pool = BlockPool(blocks, BLOCK, self.windows)
        shared = self.shared_prefixes
        self.cache = NullPrefixCache() if shared is None else RadixPrefixCache(self.pool, shared, self.new_tier())
        self.model = PagedModel(blocks, BLOCK, max_tokens=tokens, max_seqs=seqs, windows=self.windows)
        self.tokens = tokens
        self.queue = queue
        config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_num_queued_requests=queue)
        moves = MoveCost(BLOCK, 1.0 * BLOCK)
        self.scheduler = Scheduler(
            config, self.pool, 60, eos_token_ids=ENDS, policy=self.policy(), budget=self.budget(tokens),
            prefix_cache=self.cache, moves=moves,
        )
        self.sequences = []
        self.said = {}
        self.number = 0
        self.computed = {}
        """By salt: all beginnings of texts that its sequences have computed."""

    def new_tier(self):
        return OffloadIndex(self.tier_slots, "this model")

    @rule(
        # Few different prompts, so that prefixes are shared.
        length=st.integers(0, 40),
        first=st.integers(0, 2),
        max_tokens=st.integers(1, 30) | st.none(),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        ignore_eos=st.booleans(),
        min_tokens=st.integers(0, 1),
        turn=st.integers(0, 45),
        tenant=st.sampled_from(["", "a", "b"]),
        priority=st.integers(-2, 2),
        data=st.data(),
    )
    def add(self, length, first, max_tokens, n, ignore_eos, min_tokens, turn, tenant, priority, data):
        sampling = SamplingParams(max_tokens=max_tokens, n=n, ignore_eos=ignore_eos, min_tokens=min_tokens)
        prompt = tuple((first + i) % VOCAB for i in range(length))
        if self.sequences and data.draw(st.booleans()):
            # The next turn of a conversation, or another answer to a beginning of it.
            prompt = tuple(data.draw(st.sampled_from(self.sequences)).token_ids[:turn]) + prompt[: max(0, 40 - turn)]
            length = len(prompt)
        self.number += 1
        try:
            priority *= self.policy is PriorityClasses
            sequences = self.scheduler.add(Request(str(self.number), prompt, sampling, priority, tenant))
        except QueueFullError:
            assert self.scheduler.backlog.requests == self.queue
        except RequestError:
            room = self.pool.num_blocks - self.cache.num_reserved
            limit = min(60, self.pool.windows.longest(room, self.tokens, 60))
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
        self.check_hits(scheduled)
        for sequence, token in self.scheduler.update(scheduled, self.model.execute(scheduled)):
            self.said[sequence.sequence_id].append(token.token_id)
        self.books_agree()

    @invariant()
    def books_agree(self):
        self.scheduler.check()
        for sequence in self.sequences:
            for group, table in enumerate(sequence.table.by_group):
                most = self.pool.windows.most_in_group(group, self.tokens)
                assert most is None or len(table.held) <= most, "it keeps what it does not see"

    def check_hits(self, scheduled):
        """What a sequence starts from was computed by its own salt, or is in whole blocks of what is declared."""
        by_id = {s.sequence_id: s for s in self.sequences}
        tokens = {p.sequence_id: tuple(by_id[p.sequence_id].token_ids[: p.end]) for p in scheduled.sequences}
        declared = [p[: len(p) // BLOCK * BLOCK] for p in self.shared_prefixes or ()]
        for part in scheduled.sequences:
            salt = by_id[part.sequence_id].request.tenant
            if self.shared_prefixes is not None and part.start:
                known = tokens[part.sequence_id][: part.start]
                own = any(known == text[: part.start] for text in self.computed.get(salt, ()))
                assert own or any(known == prefix[: part.start] for prefix in declared)
        for part in scheduled.sequences:
            self.computed.setdefault(by_id[part.sequence_id].request.tenant, set()).add(tokens[part.sequence_id])

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
        assert self.scheduler.num_free_blocks >= self.pool.num_blocks - self.cache.num_reserved
        self.cache.evict(self.pool.num_blocks)
        assert self.pool.num_free >= self.pool.num_blocks - self.cache.num_reserved
        self.books_agree()
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
    """The same with a prefix cache: nobody says anything else for it, and nobody sees another's."""

    shared_prefixes = ()


class WithSharedPrefixes(SchedulerMachine):
    """And with beginnings that all tenants share."""

    shared_prefixes = (tuple(range(11)), tuple(range(1, 6)))


class WithSecondTier(WithSharedPrefixes):
    """And with a tier for evicted blocks, whose content is lost now and then, and which is not always worth it."""

    tier_slots = 12

    @rule(data=st.data())
    def lose(self, data):
        if self.model.tier:
            slot = data.draw(st.sampled_from(sorted(self.model.tier)))
            self.model.tier[slot] = b"another", []

    @rule(seconds=st.sampled_from([0.1, 10.0]))
    def compute_faster_or_slower(self, seconds):
        self.model.token_seconds = seconds


class LastComeFirstServed(FirstComeFirstServed):
    """A policy under which a newcomer overtakes everybody."""

    def place(self, sequence):
        return (-sequence.arrival, sequence.index)


class WithAnotherPolicy(SchedulerMachine):
    """The same through the policy's seam."""

    shared_prefixes = ()
    policy = LastComeFirstServed


class WithPriorities(WithSharedPrefixes):
    """Some overtake others."""

    policy = PriorityClasses


class WithTenants(WithSecondTier):
    """The order changes with every token."""

    policy = FairShare


class WithTargets(WithTenants):
    """Steps are as small as they can be."""

    @staticmethod
    def budget(tokens):
        return ItlBudget(tokens, 1e-9, LinearCost())


class WithWindows(WithSecondTier):
    """Layers of three kinds: some see all, others less than what is common or a block's worth."""

    windows = (None, 9, 3)


class WithWindowsOnly(WithSecondTier):
    """No layer sees all."""

    windows = (6,)


class WithWindowsAndNoCache(SchedulerMachine):
    """What nobody sees any more is free at once."""

    windows = (None, 7)


MACHINES = [SchedulerMachine, WithPrefixCache, WithSharedPrefixes, WithSecondTier, WithAnotherPolicy, WithPriorities,
            WithTenants, WithTargets, WithWindows, WithWindowsOnly, WithWindowsAndNoCache]  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES)
def test_any_order_of_requests_aborts_and_steps(machine):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
