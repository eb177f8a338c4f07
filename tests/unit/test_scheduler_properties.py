"""Whatever comes in whatever order: no block is lost, every limit holds, and everybody says what they say alone."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import initialize, invariant, precondition, rule
from paged_draft import DraftedModel, TwiceDraftedModel
from paged_model import VOCAB, PagedModel, expected_tokens, next_token
from state_machines import SHARE, CountedMachine, run_machine
from virtual_time import LinearCost

from kvarn.cache import BlockPool, NullPrefixCache, OffloadIndex, RadixPrefixCache
from kvarn.config import SchedulerConfig
from kvarn.errors import QueueFullError, RequestError
from kvarn.request import FinishReason, Request, SamplingParams
from kvarn.scheduler import (
    AutoSpeculation,
    ConstantBudget,
    FairShare,
    FirstComeFirstServed,
    FixedSpeculation,
    ItlBudget,
    MoveCost,
    NoSpeculation,
    PriorityClasses,
    Scheduler,
    StepShape,
    TwoSources,
)
from kvarn.scheduler.drafting import DraftLimits
from kvarn.scheduler.policy import order_key

pytestmark = pytest.mark.long

BLOCK = 4
ENDS = frozenset({0, 1})


class SchedulerMachine(CountedMachine):
    """Adds, aborts and steps at random under random limits, and remembers what everybody must say."""

    shared_prefixes: tuple[tuple[int, ...], ...] | None = None
    """None: no prefix cache."""
    tier_slots = 0
    windows: tuple[int | None, ...] = (None,)
    """Of the KV groups."""
    policy = FirstComeFirstServed
    budget = ConstantBudget
    speculation = NoSpeculation
    reference_every = 0
    model_type = PagedModel
    writes_ahead = False

    @initialize(
        blocks=st.integers(4, 24), seqs=st.integers(1, 6), spare_tokens=st.integers(0, 20), queue=st.integers(1, 6)
    )
    def start(self, blocks, seqs, spare_tokens, queue):
        tokens, blocks = seqs + spare_tokens, blocks * len(self.windows)
        self.pool = BlockPool(blocks, BLOCK, self.windows)
        shared = self.shared_prefixes
        self.cache = NullPrefixCache() if shared is None else RadixPrefixCache(self.pool, shared, self.new_tier())
        self.model = self.model_type(blocks, BLOCK, max_tokens=tokens, max_seqs=seqs, windows=self.windows)
        self.tokens = tokens
        self.queue = queue
        config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_num_queued_requests=queue)
        self.cost = LinearCost()
        block_seconds = self.cost.token * BLOCK
        moves = MoveCost(BLOCK, block_seconds / 2, block_seconds / 2, self.cost)
        self.scheduler = Scheduler(
            config, self.pool, 60, eos_token_ids=ENDS, policy=self.policy(), budget=self.budget(tokens),
            prefix_cache=self.cache, moves=moves, speculation=self.speculation(),
            draft_limits=DraftLimits(9, 60, self.reference_every, self.writes_ahead),
        )  # fmt: skip
        self.sequences = []
        self.said = {}
        self.number = 0
        self.computed = {}
        """By salt: all beginnings of texts that its sequences have computed."""
        self.unchecked = False
        """Whether something was done since the last check."""
        self.idle_steps = 0
        """Steps up to the last in which nobody got on."""

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
        self.ask(prompt, sampling, priority * (self.policy is PriorityClasses), tenant)

    def ask(self, prompt, sampling, priority, tenant):
        """Adds a request, or sees that there is a reason not to take it."""
        length, most = len(prompt), max(sampling.max_tokens or 0, sampling.min_tokens)
        self.number += 1
        self.unchecked = True
        try:
            sequences = self.scheduler.add(Request(str(self.number), prompt, sampling, priority, tenant))
        except QueueFullError:
            assert self.scheduler.backlog.requests == self.queue
        except RequestError:
            room = self.pool.num_blocks - self.cache.num_reserved
            limit = min(60, self.pool.windows.longest(room, self.tokens, 60))
            assert length == 0 or length >= limit or length + most > limit
        else:
            self.sequences += sequences
            self.said |= {s.sequence_id: [] for s in sequences}

    @rule(data=st.data())
    def abort(self, data):
        names = sorted({s.request.request_id for s in self.sequences if not s.finished})
        if names:
            self.unchecked = True
            self.scheduler.abort(data.draw(st.sampled_from(names)))

    @rule(data=st.data())
    def finish(self, data):
        live = [s for s in self.sequences if not s.finished and s.num_output_tokens]
        if live:
            self.unchecked = True
            self.scheduler.finish(data.draw(st.sampled_from(live)).sequence_id, FinishReason.STOP, "word")

    @rule(steps=st.integers(1, 8))
    def steps(self, steps):
        for _ in range(steps):
            if self.scheduler.has_work():
                self.one_step()

    @precondition(lambda self: self.scheduler.has_work())
    @rule(data=st.data())
    def abort_within_a_step(self, data):
        scheduled = self.schedule()
        self.abort(data)
        self.book(scheduled)

    def one_step(self):
        self.book(self.schedule())

    def schedule(self):
        """A step. Whoever is first of those that hold blocks gets on in it, where he runs: he is not preempted.

        Somebody gets on in it, or in the next, where the last that ran was preempted for one that waits with blocks.
        """
        live = [s for s in self.sequences if not s.finished]
        running = set(self.scheduler.running_ids)
        holding = [s for s in live if s.sequence_id in running or len(s.table)]
        first = min(holding, key=lambda s: order_key(self.scheduler.policy, s), default=None)
        scheduled = self.scheduler.schedule()
        parts = {s.sequence_id for s in scheduled.sequences}
        assert first is None or first.sequence_id not in running or first.sequence_id in parts, "the first waits"
        self.idle_steps = 0 if not live or parts or scheduled.block_loads else self.idle_steps + 1
        assert self.idle_steps < 2, "nobody gets on"
        return scheduled

    def book(self, scheduled):
        """What the step is and reads is checked by the model: its budget, and that blocks hold what they should."""
        self.check_hits(scheduled)
        result = self.model.execute(scheduled)
        self.note_accepted(scheduled, result)
        for sequence, token in self.scheduler.update(scheduled, result):
            self.said[sequence.sequence_id].append(token.token_id)
        self.unchecked = True
        self.books_agree()

    @invariant()
    def books_agree(self):
        """No block is lost or owned twice, references are right, the tree is consistent, nobody is in no queue."""
        if not self.unchecked:
            return
        self.scheduler.check()
        for sequence in self.sequences:
            ahead = len(sequence.draft) if self.writes_ahead and not sequence.copied else 0
            if sequence.sequence_id in self.scheduler.running_ids:
                held = sequence.num_computed_tokens + ahead
                assert (len(sequence.table) - 1) * BLOCK < held, "it has blocks for nothing"
            for group, table in enumerate(sequence.table.by_group):
                most = self.pool.windows.most_in_group(group, self.tokens)
                assert most is None or table.num_held <= most + ahead, "it keeps what it does not see"
        self.count_step()
        self.unchecked = False

    def check_hits(self, scheduled):
        """What a sequence starts from was computed by its own salt, or is in whole blocks of what is declared."""
        by_id = {s.sequence_id: s for s in self.sequences}
        tokens = {p.sequence_id: tuple(by_id[p.sequence_id].token_ids[: p.end]) for p in scheduled.sequences}
        declared = [p[: len(p) // BLOCK * BLOCK] for p in self.shared_prefixes or ()]
        for part in scheduled.sequences:
            salt = by_id[part.sequence_id].request.tenant
            if self.shared_prefixes is not None and part.start:
                known = tokens[part.sequence_id][: part.start]
                own = known in self.computed.get(salt, ())
                assert own or any(known == prefix[: part.start] for prefix in declared)
        for part in scheduled.sequences:
            computed = self.computed.setdefault(by_id[part.sequence_id].request.tenant, set())
            computed.update(tokens[part.sequence_id][:end] for end in range(part.start + 1, part.end + 1))

    def note_accepted(self, scheduled, result):
        """What was guessed right was computed, too."""
        by_id = {s.sequence_id: s for s in self.sequences}
        for part in scheduled.sequences:
            accepted = sum(token.sequence_id == part.sequence_id for token in result.sampled) - 1
            sequence = by_id[part.sequence_id]
            if part.draft and not sequence.finished:
                said = [token.token_id for token in result.sampled if token.sequence_id == part.sequence_id]
                text = (*sequence.token_ids, *said[:accepted])
                ends = range(len(sequence.token_ids) + 1, len(text) + 1)
                self.computed[sequence.request.tenant].update(text[:end] for end in ends)

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
        self.scheduler.check()
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

    @rule(slots=st.sets(st.integers(0, tier_slots - 1), max_size=4))
    def lose(self, slots):
        for slot in slots & self.model.tier.keys():
            self.model.tier[slot] = b"another", []

    @rule(data=st.data(), others=st.integers(1, 3), steps=st.integers(5, 12))
    def ask_again_after_others(self, data, others, steps):
        """Other texts take the blocks of an earlier one; then somebody asks for that again."""
        if not self.sequences:
            return
        earlier = data.draw(st.sampled_from(self.sequences))
        sampling = SamplingParams(max_tokens=2, ignore_eos=True)
        for other in range(others):
            self.ask(tuple((7 * other + i * i) % VOCAB for i in range(40)), sampling, 0, earlier.request.tenant)
            self.steps(steps)
        self.ask(tuple(earlier.token_ids[:45]), sampling, 0, earlier.request.tenant)
        self.steps(steps)

    @rule(seconds=st.sampled_from([1e-4, 1e-2]))
    def compute_faster_or_slower(self, seconds):
        self.cost.token = seconds


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


class WithDrafts(WithTenants):
    """Tokens are guessed, and some guesses are right."""

    @staticmethod
    def speculation():
        return FixedSpeculation(5)

    @initialize(seed=st.integers(0, 2**32))
    def guess(self, seed):
        self.rng = random.Random(seed)

    def book(self, scheduled):
        self.model.guess = self.draft
        drafts = sum(len(part.draft) for part in scheduled.sequences)
        assert drafts <= 9
        for part in scheduled.sequences:
            assert part.num_drafts_wanted <= part.num_nodes_wanted <= self.scheduler.drafting.control.most
        super().book(scheduled)
        self.scheduler.drafting.control.timed(StepShape.of(scheduled), self.rng.choice([0.001, 0.1]))

    def draft(self, token_ids, stream, most):
        """Right up to a random place."""
        text = list(token_ids)
        for _ in range(self.rng.randint(0, most)):
            text.append(next_token(text, stream) if self.rng.random() < 0.8 else self.rng.randrange(VOCAB))
        return tuple(text[len(token_ids) :])

    def teardown(self):
        super().teardown()
        if hasattr(self, "scheduler"):
            counts = self.scheduler.drafting.counts
            accepted, drafted = (
                sum(getattr(s, name) for s in self.sequences) for name in ("num_accepted_tokens", "num_draft_tokens")
            )
            assert counts.accepted_tokens == sum(counts.by_position) == accepted <= counts.draft_tokens == drafted


class WithTrees(WithDrafts):
    """Guesses branch."""

    reference_every = 3

    def book(self, scheduled):
        self.model.guess_tree = self.tree
        super().book(scheduled)

    def tree(self, token_ids, stream, part):
        """Guesses that follow random ones before them, some of them right."""
        texts, tokens, parents = [list(token_ids)], [], []
        for _ in range(self.rng.randint(0, part.num_nodes_wanted)):
            parent = self.rng.randrange(max(0, len(texts) - 3), len(texts))
            right = self.rng.random() < 0.7
            tokens.append(next_token(texts[parent], stream) if right else self.rng.randrange(VOCAB))
            parents.append(parent - 1)
            texts.append([*texts[parent], tokens[-1]])
        return tokens, parents


class WithChosenTrees(WithTrees):
    """And as many of them are verified as seem to pay."""

    reference_every = 0

    @staticmethod
    def speculation():
        return AutoSpeculation(7, LinearCost())


class WithWindowsAndTrees(WithTrees):
    """In every group, of which some see less than a branch is long."""

    windows = (None, 9, 3)


class WithChosenDrafts(WithDrafts):
    """As many are verified as seem to pay."""

    @staticmethod
    def speculation():
        return AutoSpeculation(5, LinearCost())


class WithDraftsAndTargets(WithDrafts, WithTargets):
    """And steps are to take no longer than some tokens do."""

    @staticmethod
    def budget(tokens):
        return ItlBudget(tokens, 0.012, LinearCost())


class Fickle(FixedSpeculation):
    """Does not want guesses all the time."""

    def __init__(self, k):
        super().__init__(k)
        self.rng = random.Random(k)

    def wanted(self, sequence):
        return super().wanted(sequence) if self.rng.random() < 0.8 else 0


class WithADraftModel(WithDrafts):
    """Whose own KV is in the same blocks: what it guesses follows the text that it has really read."""

    model_type = DraftedModel
    writes_ahead = True

    @staticmethod
    def speculation():
        return Fickle(5)

    def book(self, scheduled):
        self.model.say = lambda text, stream: (
            next_token(text, stream) if self.rng.random() < 0.8 else self.rng.randrange(VOCAB)
        )
        super().book(scheduled)


class WithADraftModelAndWindows(WithADraftModel):
    """Its KV is in the blocks of the group that keeps all tokens."""

    windows = (None, 9, 3)


class FickleSources(Fickle):
    """Wants copies now and then, short ones not always."""

    def copies(self, sequence):
        return self.rng.choice([(0, 0), (7, 0), (7, 3)])


class WithTwoSources(WithADraftModel):
    """What is found is copied, and a draft model is asked where nothing is."""

    model_type = TwiceDraftedModel

    @staticmethod
    def speculation():
        return FickleSources(5)

    def book(self, scheduled):
        self.model.recall = lambda text, stream, most: (
            self.draft(text, stream, most) if self.rng.random() < 0.5 else ()
        )
        super().book(scheduled)


class WithChosenSources(WithTwoSources):
    """As seems to pay."""

    @staticmethod
    def speculation():
        return TwoSources(5, 7, LinearCost())


class WithWindows(WithSecondTier):
    """Layers of three kinds: some see all, others less than what is common or a block's worth."""

    windows = (None, 9, 3)


class WithWindowsOnly(WithSecondTier):
    """No layer sees all."""

    windows = (6,)


class WithWindowsAndNoCache(SchedulerMachine):
    """What nobody sees any more is free at once."""

    windows = (None, 7)


class WithWindowsAndDrafts(WithDrafts):
    """What was guessed is written in every group, and given back in every group where it was wrong."""

    windows = (None, 9, 3)


class WithWindowsAndDraftsOnly(WithDrafts):
    """Windows of less than a draft, and nobody sees all."""

    windows = (2, 6)


MACHINES = [
    SchedulerMachine, WithPrefixCache, WithSharedPrefixes, WithSecondTier, WithAnotherPolicy, WithPriorities,
    WithTenants, WithTargets, WithDrafts, WithChosenDrafts, WithDraftsAndTargets, WithWindows, WithWindowsOnly,
    WithWindowsAndNoCache, WithWindowsAndDrafts, WithWindowsAndDraftsOnly, WithADraftModel, WithADraftModelAndWindows,
    WithTwoSources, WithChosenSources,
    WithTrees, WithChosenTrees, WithWindowsAndTrees,
]  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES)
def test_any_order_of_requests_aborts_and_steps(machine):
    run_machine(machine, length=30)


def test_all_machines_together_take_as_many_steps_as_they_should():
    """Beside these there are the three of test_radix_properties.py."""
    assert (len(MACHINES) + 3) * SHARE >= 100_000
