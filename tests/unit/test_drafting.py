"""Drafts in the scheduler, case by case: where they find room, how they are booked, and that they hold nobody up."""

import pytest
from paged_model import PagedModel, expected_tokens, next_token
from virtual_time import LinearCost

from kvarn.cache import BlockPool, RadixPrefixCache
from kvarn.config import SchedulerConfig
from kvarn.draft_tree import levels, path, pruned
from kvarn.errors import RequestError
from kvarn.request import FinishReason, Request, SamplingParams
from kvarn.scheduler import FairShare, FixedSpeculation, ItlBudget, NullObserver, Scheduler

BLOCK = 4


class Verified(NullObserver):
    """Remembers what came of each draft."""

    def __init__(self):
        self.drafts = []

    def verified(self, sequence, drafted, accepted):
        self.drafts.append((sequence.sequence_id, drafted, accepted))


class Bench:
    """A scheduler, and a model with a drafter that is right for `right` tokens."""

    def __init__(self, *, k=3, right=99, blocks=64, seqs=8, tokens=64, eos=(), caching=False, most=64,
                 windows=(None,), **parts):  # fmt: skip
        """blocks: of each KV group."""
        blocks *= len(windows)
        self.pool = BlockPool(blocks, BLOCK, windows)
        self.model = PagedModel(blocks, BLOCK, max_tokens=tokens, max_seqs=seqs, windows=windows)
        self.right = right
        self.model.guess = self.guess
        self.observer = Verified()
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens), self.pool, 100, eos_token_ids=eos,
            speculation=FixedSpeculation(k), observer=self.observer, max_step_drafts=most,
            prefix_cache=RadixPrefixCache(self.pool) if caching else None, **parts,
        )  # fmt: skip
        self.said = {}

    def guess(self, token_ids, stream, most):
        text = list(token_ids)
        for place in range(most):
            text.append(next_token(text, stream) + (place >= self.right))
        return tuple(text[len(token_ids) :])

    def branch(self, token_ids, stream, part):
        """A tree: a wrong guess, the right ones `right` levels deep each with a wrong one before it."""
        text, tokens, parents, at = list(token_ids), [], [], -1
        while len(tokens) + 2 <= part.num_nodes_wanted:
            text.append(next_token(text, stream))
            wrong = len(parents) // 2 >= self.right
            tokens += [text[-1] + 50, text[-1] + wrong]
            parents += [at, at]
            at = len(tokens) - 1
        return tokens, parents

    def add(self, name, prompt, tenant="", **sampling):
        sequences = self.scheduler.add(Request(name, tuple(prompt), SamplingParams(**sampling), tenant=tenant))
        self.said |= {s.sequence_id: [] for s in sequences}
        return sequences[0]

    def step(self, stops=lambda sequence, token: None):
        scheduled = self.scheduler.schedule()
        for sequence, token in self.scheduler.update(scheduled, self.model.execute(scheduled), stops):
            self.said[sequence.sequence_id].append(token.token_id)
        self.scheduler.check()
        return scheduled

    def run(self):
        while self.scheduler.has_work():
            self.step()


def rows(scheduled):
    return [(len(s.token_ids), len(s.draft)) for s in scheduled.sequences]


def test_what_was_guessed_right_comes_in_one_step():
    bench = Bench()
    sequence = bench.add("a", range(6), max_tokens=9)
    assert [rows(bench.step()) for _ in range(3)] == [[(6, 0)], [(1, 3)], [(1, 3)]]
    assert bench.said[0] == expected_tokens(range(6), 0, max_length=15)
    assert sequence.finish_reason is FinishReason.LENGTH
    assert bench.observer.drafts == [(0, 3, 3), (0, 3, 3)]
    assert (sequence.num_draft_tokens, sequence.num_accepted_tokens) == (6, 6)


WINDOWS = pytest.mark.parametrize("windows", [(None,), (None, 6, 2), (5, 7)])
"""Of KV groups whose layers see so many tokens."""


@WINDOWS
@pytest.mark.parametrize("right", [0, 1, 2])
def test_after_the_first_wrong_guess_the_rest_is_forgotten(right, windows):
    bench = Bench(right=right, caching=True, windows=windows)
    sequence = bench.add("a", range(6), max_tokens=20)
    bench.step()
    for _ in range(4):
        tokens = sequence.num_tokens
        bench.step()
        assert sequence.num_tokens == tokens + right + 1
        assert sequence.num_computed_tokens == sequence.num_tokens - 1
        assert len(sequence.table) == -(-sequence.num_computed_tokens // BLOCK), "no block for what was forgotten"
        last = sequence.num_computed_tokens - 1
        for group, table in enumerate(sequence.table.by_group):
            assert table.num_holes == bench.pool.windows.first(group, last), "windows end at the last computed token"
    bench.run()
    assert bench.said[0] == expected_tokens(range(6), 0, max_length=26)
    counts = bench.scheduler.drafting.counts
    assert len(counts.by_position) == right
    assert counts.accepted_tokens == sum(counts.by_position)


def test_no_more_is_guessed_than_the_sequence_may_say():
    bench = Bench(k=9)
    bench.add("a", range(6), max_tokens=4)
    assert [rows(bench.step()) for _ in range(2)] == [[(6, 0)], [(1, 2)]]
    assert bench.said[0] == expected_tokens(range(6), 0, max_length=10)
    bench = Bench(k=3)
    bench.add("a", range(6), max_tokens=7)
    assert [rows(bench.step()) for _ in range(3)] == [[(6, 0)], [(1, 3)], [(1, 1)]]
    assert bench.said[0] == expected_tokens(range(6), 0, max_length=13)


@pytest.mark.parametrize("by", ["eos", "stop token", "stops"])
def test_what_comes_after_an_end_inside_a_draft_is_dropped(by):
    expected = expected_tokens(range(6), 0, max_length=30)
    end = expected[3]
    assert end not in expected[:3]
    bench = Bench(k=9, eos=(end,) if by == "eos" else (), caching=True)
    sequence = bench.add("a", range(6), max_tokens=20, stop_token_ids=(end,) if by == "stop token" else ())
    bench.step()
    bench.step(lambda _, token: "word" if by == "stops" and token.token_id == end else None)
    assert bench.said[0] == expected[:4]
    assert sequence.token_ids[6:] == expected[:4]
    assert sequence.stop_reason == {"eos": None, "stop token": end, "stops": "word"}[by]
    assert sequence.finish_reason is FinishReason.STOP
    assert sequence.num_accepted_tokens == 3
    assert bench.scheduler.num_free_blocks == 64


def test_a_request_ended_while_its_draft_is_verified_gains_nothing():
    bench = Bench()
    sequence = bench.add("a", range(6), max_tokens=20)
    bench.step()
    scheduled = bench.scheduler.schedule()
    bench.scheduler.abort("a")
    assert bench.scheduler.update(scheduled, bench.model.execute(scheduled)) == []
    assert (sequence.num_draft_tokens, sequence.num_output_tokens) == (0, 1)
    bench.scheduler.check()


def test_drafts_are_part_of_the_budget_and_leave_room_for_prompts():
    bench = Bench(k=9, seqs=4, tokens=32)
    for name in "abc":
        bench.add(name, range(4), max_tokens=40)
    bench.step()
    bench.add("long", range(60), max_tokens=1)
    assert rows(bench.step()) == [(1, 4), (1, 4), (1, 5), (16, 0)]
    bench = Bench(k=9, most=7)
    bench.add("a", range(4), max_tokens=40)
    bench.add("b", range(4), max_tokens=40)
    bench.step()
    assert rows(bench.step()) == [(1, 3), (1, 4)]


def test_guesses_keep_to_the_target_of_a_steps_time():
    """A step of two tokens takes 6 ms, each further one 1 ms more; 85 % of the target are planned."""
    for target, drafts in ((0.0059, 0), (0.0095, 2), (1.0, 6)):
        bench = Bench(k=3, budget=ItlBudget(64, target, LinearCost(0.004, 0.001, 0.0, 0.0)))
        bench.add("a", range(6), max_tokens=40)
        bench.add("b", range(6), max_tokens=40)
        while bench.scheduler.num_running_tokens < 14:
            bench.step()
        assert sum(len(part.draft) for part in bench.step().sequences) == drafts


@WINDOWS
def test_a_draft_takes_no_block_that_another_needs(windows):
    """Guesses that are all wrong change neither who runs in a step nor who is preempted."""
    drafting, plain = (Bench(k=8, right=0, blocks=7, windows=windows) for _ in range(2))
    plain.model.guess = lambda *_: ()
    seen = []
    for bench in (drafting, plain):
        for first in (0, 50, 100):
            bench.add(str(first), range(first, first + 6), max_tokens=12)
        steps = []
        while bench.scheduler.has_work():
            steps.append([(s.sequence_id, s.start, s.token_ids) for s in bench.step().sequences])
        seen.append((steps, bench.scheduler.num_preemptions, bench.said))
    assert seen[0] == seen[1]
    if None in windows:  # else nobody grows beyond windows
        assert drafting.scheduler.num_preemptions > 0
    assert len(drafting.observer.drafts) > 20
    assert not plain.observer.drafts


def test_the_preempted_one_loses_its_draft():
    bench = Bench(k=3, blocks=6, right=1)
    bench.add("a", range(8), max_tokens=14)
    second = bench.add("b", range(50, 58), max_tokens=14)
    while not bench.scheduler.num_preemptions:
        bench.step()
    assert second.draft == ()
    bench.run()
    assert bench.said[0] == expected_tokens(range(8), 0, max_length=22)
    assert bench.said[1] == expected_tokens(range(50, 58), 0, max_length=22)


def test_the_policy_is_told_of_every_token_that_became_output():
    bench = Bench(policy=FairShare(), right=2)
    bench.add("a", range(6), max_tokens=10, tenant="ann")
    bench.run()
    assert bench.scheduler.policy.rank("ann") == 6 + 2 * 10


def test_a_request_may_ask_for_fewer_or_none():
    bench = Bench(k=3)
    for wanted in (None, 0, 2, 3):
        bench.add(str(wanted), range(6), max_tokens=9, num_speculative_tokens=wanted)
    bench.step()
    assert rows(bench.step()) == [(1, 3), (1, 0), (1, 2), (1, 3)]
    with pytest.raises(RequestError, match="must be 0 to 3"):
        bench.add("more", range(6), num_speculative_tokens=4)
    assert bench.scheduler.steady_steps(10) == 0, "steps are not alike where tokens are guessed"


def test_rejected_tokens_never_enter_the_prefix_cache():
    """What another finds in the cache is what was said."""
    bench = Bench(k=7, right=2, caching=True)
    bench.add("a", range(6), max_tokens=30)
    bench.run()
    text = [*range(6), *bench.said[0]]
    bench.add("b", [*text, 1], max_tokens=1)
    scheduled = bench.step()
    assert scheduled.sequences[0].start == len(text) - 1
    assert bench.said[1] == expected_tokens([*text, 1], 0, max_length=len(text) + 2)


def trees(**settings):
    """A bench whose drafts are trees with the right guesses in every second place."""
    bench = Bench(**settings)
    bench.model.guess_tree = bench.branch
    return bench


@WINDOWS
@pytest.mark.parametrize("right", [0, 1, 99])
def test_a_tree_brings_what_its_branch_says(right, windows):
    """Its guesses take slots and rows; what is right moves up, what is not is forgotten."""
    bench = trees(k=8, right=right, caching=True, windows=windows)
    sequence = bench.add("a", range(6), max_tokens=22)
    assert rows(bench.step()) == [(6, 0)]
    scheduled = bench.step()
    assert rows(scheduled) == [(1, 8)]
    assert scheduled.sequences[0].parents == (-1, -1, 1, 1, 3, 3, 5, 5)
    assert sequence.num_tokens == 7 + min(right, 4) + 1
    assert len(sequence.table) == -(-sequence.num_computed_tokens // BLOCK)
    bench.run()
    assert bench.said[0] == expected_tokens(range(6), 0, max_length=28)
    counts = bench.scheduler.drafting.counts
    assert len(counts.by_position) == min(right, 4), "they are counted by how far ahead they are"
    assert counts.accepted_tokens == sum(counts.by_position)
    text = [*range(6), *bench.said[0]]
    bench.add("b", [*text, 1], max_tokens=1)
    assert bench.step().sequences[0].start == len(text) - 1
    assert bench.said[1] == expected_tokens([*text, 1], 0, max_length=len(text) + 2)


def test_a_tree_goes_no_further_than_the_sequence_may_and_its_slots_no_further_than_the_model():
    bench = trees(k=9)
    bench.add("a", range(6), max_tokens=5)
    bench.step()
    (part,) = bench.step().sequences
    assert levels(part.parents) == [0, 0, 1, 1, 2, 2]
    bench = trees(k=9)
    bench.add("a", range(92))
    assert [rows(bench.step()) for _ in range(3)] == [[(64, 0)], [(28, 0)], [(1, 6)]]
    bench.run()
    assert bench.said[0] == expected_tokens(range(92), 0, max_length=100)


def test_of_a_draft_that_is_longer_than_was_asked_what_has_a_slot_is_verified():
    bench = trees(k=9)
    bench.model.guess_tree = lambda text, stream, part: ([0] * 40, [-1] * 40)
    bench.add("a", range(92))
    while bench.scheduler.has_work():
        assert all(part.end + len(part.draft) <= 100 for part in bench.step().sequences)
    assert bench.scheduler.drafting.counts.draft_tokens > 0
    assert bench.said[0] == expected_tokens(range(92), 0, max_length=100)


def test_of_a_tree_there_is_room_for_a_beginning():
    bench = trees(k=8, most=5)
    bench.add("a", range(4), max_tokens=40)
    bench.add("b", range(4), max_tokens=40)
    bench.step()
    scheduled = bench.step()
    assert [part.parents for part in scheduled.sequences] == [(-1, -1), (-1, -1, 1)]
    assert [len(tokens) for tokens in bench.said.values()] == [3, 3]


@pytest.mark.parametrize("every", [4, 16])
def test_where_a_cache_holds_one_guess_the_others_and_what_follows_them_are_left_out(every):
    """At positions that are multiples of `every`. The wrong one comes first here, and cuts the tree."""
    bench = trees(k=8, reference_every=every)
    bench.add("a", range(6), max_tokens=40)
    cut = 0
    while bench.scheduler.has_work():
        for part in bench.step().sequences:
            at = [part.end + level for level in levels(part.parents)]
            referred = [position for position in at if position % every == 0]
            assert len(referred) == len(set(referred))
            cut += 0 < len(at) < 8
    assert cut
    assert bench.said[0] == expected_tokens(range(6), 0, max_length=46)


def test_paths_and_parts_of_trees():
    tokens, parents = (5, 6, 7, 7, 6, 8), (-1, -1, 1, 0, 0, 2)
    assert levels(parents) == [0, 0, 1, 1, 1, 2]
    assert path(tokens, parents, [6, 7, 8, 9]) == [1, 2, 5]
    assert path(tokens, parents, [5, 6]) == [0, 4]
    assert path(tokens, parents, [7, 7]) == []
    assert path((3, 3), (-1, -1), [3, 3]) == [0]
    assert pruned(tokens, parents, lambda place, level: place != 1) == ((5, 7, 6), (-1, 0, 0))
    assert pruned(tokens, parents, lambda place, level: level < 1) == ((5, 6), (-1, -1))
    assert pruned(tokens, parents, lambda place, level: place != 0) == ((6, 7, 8), (-1, 0, 1))


def test_a_drafter_that_computes_its_guesses_gets_blocks_for_them_until_somebody_needs_those():
    bench = Bench(blocks=5, writes_ahead=True)
    first = bench.add("a", range(6), max_tokens=9)
    (part,) = bench.step().sequences
    assert len(part.block_tables[0]) * BLOCK >= part.end + part.num_drafts_wanted == 9
    assert len(first.table) == 3, "what was guessed stays where it is"
    second = bench.add("b", range(20, 26), max_tokens=2)
    scheduled = bench.step()
    assert [p.sequence_id for p in scheduled.sequences] == [0, 1], "nobody waits for the room of a guess"
    assert first.num_preemptions == second.num_preemptions == 0
    bench.run()
    assert bench.said[0] == expected_tokens(range(6), 0, max_length=15)
    assert bench.scheduler.num_free_blocks == 5


def test_nobody_is_preempted_for_the_room_of_a_guess():
    """The first one's guesses have the blocks that the second one comes to need."""
    bench = Bench(k=7, right=0, blocks=6, writes_ahead=True)
    both = [bench.add("a", range(6), max_tokens=10), bench.add("b", range(20, 26), max_tokens=6)]
    bench.step()
    assert [len(sequence.table) for sequence in both] == [4, 2]
    bench.run()
    assert [sequence.num_preemptions for sequence in both] == [0, 0]
    assert bench.said[0] == expected_tokens(range(6), 0, max_length=16)
    assert bench.said[1] == expected_tokens(range(20, 26), 0, max_length=12)


def test_blocks_for_guesses_are_given_back_when_none_is_made_any_more():
    bench = Bench(writes_ahead=True)
    sequence = bench.add("a", range(6), max_tokens=40)
    bench.step()
    assert len(sequence.table) == 3
    control = bench.scheduler.drafting.control
    control.most, control.choose = 0, lambda drafted, shape, room: [0] * len(drafted)
    assert rows(bench.step()) == [(1, 0)]
    assert (sequence.num_computed_tokens, len(sequence.table)) == (7, 2)


def test_no_blocks_are_taken_beyond_the_longest_text():
    bench = Bench(k=9, blocks=4, writes_ahead=True)
    bench.add("a", range(6), max_tokens=9)
    while bench.scheduler.has_work():
        scheduled = bench.step()
        assert all(len(p.block_tables[0]) <= 4 for p in scheduled.sequences)
    assert bench.said[0] == expected_tokens(range(6), 0, max_length=15)
