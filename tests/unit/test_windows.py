"""Blocks behind a window: when they are given back, what stays in the prefix cache, and how many a sequence takes."""

import hypothesis.strategies as st
import pytest
from hypothesis import given
from paged_model import PagedModel, expected_tokens

from kvarn.cache import HOLE, BlockPool, BlockTable, OffloadIndex, RadixPrefixCache, Windows, new_tables
from kvarn.config import SchedulerConfig
from kvarn.request import Request, SamplingParams
from kvarn.scheduler import Scheduler

SIZE = 4
ME = ("", "mine")


def blocks_over_time(window, chunks):
    """Blocks that a group holds before and after each step, straight from what tokens see."""
    held, computed = [], 0
    for chunk in chunks:
        kept = 0 if window is None else max(0, computed - 1 + 1 - max(window, SIZE + 1)) // SIZE
        held.append(-(-(computed + chunk) // SIZE) - kept)
        computed += chunk
    return held, computed


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
    st.lists(st.none() | st.integers(1, 20), min_size=1, max_size=3),
)
def test_the_most_blocks_are_what_the_worst_chunks_take(chunks, sizes):
    windows = Windows(SIZE, tuple(sizes))
    pool = BlockPool(1000, SIZE, tuple(sizes))
    table, computed, most = new_tables(pool), 0, 0
    end = sum(chunks)
    needed = table.blocks_to_reach(0, end, max(chunks))
    for chunk in chunks:
        table.prepare_write(computed, computed + chunk)
        most = max(most, table.num_held)
        computed += chunk
        table.slide(computed)
        if computed < end:
            assert table.num_held + table.blocks_to_reach(computed, end, max(chunks)) <= needed
    expected = [max(blocks_over_time(size, chunks)[0]) for size in sizes]
    assert most <= sum(expected) <= needed == windows.most_blocks(end, max(chunks))
    for group, row in enumerate(table.ids):
        assert all(block != HOLE for block in row[windows.first(group, computed - 1) :])
        assert all(block == HOLE for block in row[: windows.first(group, computed - 1)])
    table.release()
    assert pool.num_free == 1000


def test_a_window_of_512_takes_33_blocks_of_16_to_decode_and_65_to_prefill():
    windows = Windows(16, (None, 512, 512))
    assert windows.most_blocks(16_000, 1) == 1000 + 2 * 33
    assert windows.most_blocks(16_000, 512) == 1000 + 2 * 65
    assert windows.most_blocks(100, 512) == 3 * 7


@given(st.integers(0, 60), st.integers(1, 9), st.sampled_from([(None,), (None, 6), (9,), (30, 5)]))
def test_the_longest_sequence_is_the_longest_that_takes_no_more(blocks, chunk, sizes):
    windows = Windows(SIZE, sizes)
    longest = windows.longest(blocks, chunk, 300)
    assert longest == 0 or windows.most_blocks(longest, chunk) <= blocks
    assert longest == max(300, blocks * SIZE) or windows.most_blocks(longest + 1, chunk) > blocks


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 15))
def test_steps_after_which_a_block_has_fallen_out(start, steps, size):
    windows = Windows(SIZE, (size,))
    first = [windows.first(0, start + step - 1) if start + step else 0 for step in range(steps)]
    falls = [step for step in range(1, steps) if first[step] > first[step - 1]]
    assert list(windows.falls(0, start, steps)) == falls
    assert not windows.falls(0, start, steps) or max(first) > 0


def test_a_window_group_gives_back_what_no_token_sees():
    pool = BlockPool(20, SIZE, (None, 6))
    table = new_tables(pool)
    table.prepare_write(0, 20)
    table.slide(20)
    full, windowed = table.ids
    assert HOLE not in full
    assert windowed[:3] == (HOLE,) * 3
    assert HOLE not in windowed[3:]
    assert table.num_held == 5 + 2
    pool.check([table.held])
    assert pool.num_free == 13


def test_a_fork_one_token_before_the_end_sees_what_it_needs():
    """As sequences of n > 1 fork: one token is computed again."""
    for end in range(8, 24):
        pool = BlockPool(40, SIZE, (None, 6))
        table = new_tables(pool)
        table.prepare_write(0, end)
        table.slide(end)
        fork = table.fork(end - 1)
        assert fork.sees(end - 1)
        fork.release()
        table.release()
        assert pool.num_free == 40


def test_the_ids_are_one_object_until_a_table_changes():
    table = new_tables(BlockPool(20, SIZE, (None, 6)))
    table.prepare_write(0, 4)
    before = table.ids
    table.prepare_write(1, 4)
    assert table.ids is before
    table.prepare_write(4, 5)
    assert table.ids is not before


class Writer:
    """One sequence as the scheduler would have it."""

    def __init__(self, cache):
        self.cache, self.table, self.path, self.known = cache, new_tables(cache.pool), cache.path(ME), 0

    def run(self, tokens, chunk=SIZE):
        """Goes on from the cache and computes the rest; returns how many were found."""
        tokens = list(tokens)
        found = self.known = self.path.adopt(tokens, self.table, self.known)
        while self.known < len(tokens):
            end = min(len(tokens), self.known + chunk)
            self.cache.evict(max(0, self.table.blocks_needed(self.known, end) - self.cache.pool.num_free))
            self.table.prepare_write(self.known, end)
            self.path.insert(tokens, end, self.table)
            self.table.slide(end)
            self.known = end
        self.tokens = tokens
        return found

    def end(self):
        self.path.leave(self.tokens, self.known, self.table)
        self.table.release()
        self.known = 0


def served(cache, tokens):
    writer = Writer(cache)
    found = writer.run(tokens)
    writer.end()
    return found


class TestPrefixHits:
    @pytest.fixture
    def cache(self):
        return RadixPrefixCache(BlockPool(60, SIZE, (None, 6)))

    def test_what_fell_out_of_a_window_is_found_while_nobody_needs_it(self, cache):
        served(cache, range(40))
        assert served(cache, [*range(18), 99, 98]) == 18

    def test_what_fell_out_goes_before_what_hits_at_the_end_need(self, cache):
        served(cache, range(40))
        fell_out = 10 - 3
        cache.evict(fell_out)
        assert cache.num_evicted_tokens == 0
        assert served(cache, [*range(18), 99, 98]) == 0, "the full group has it, the other sees nothing of it"
        assert served(cache, range(45)) == 40

    def test_what_fell_out_goes_before_older_texts(self, cache):
        served(cache, range(100, 112))
        served(cache, range(40))
        cache.evict(7)
        assert served(cache, range(100, 113)) == 12
        assert served(cache, range(45)) == 40

    def test_a_hit_is_as_long_as_what_the_groups_have(self, cache):
        served(cache, range(40))
        cache.evict(4)  # of the windowed group: tokens 0 … 15
        assert served(cache, [*range(18), 99, 98]) == 0
        assert served(cache, [*range(22), 99, 98]) == 22, "token 22 sees tokens from 17 on"

    def test_what_is_gone_comes_back_when_it_is_computed_again(self, cache):
        served(cache, range(40))
        cache.evict(7)
        assert served(cache, [*range(20), 99]) == 0
        assert served(cache, [*range(20), 98]) == 20

    def test_what_is_gone_does_not_come_back_by_a_part_of_it(self, cache):
        served(cache, range(40))
        cache.evict(7)
        assert served(cache, range(2)) == 0
        assert served(cache, [*range(4), 99]) == 0

    def test_a_hit_takes_the_end_of_a_window_only(self, cache):
        served(cache, range(40))
        writer = Writer(cache)
        assert writer.run(range(41)) == 40
        assert [table.num_holes for table in writer.table.by_group] == [0, 8]

    def test_evicting_a_node_takes_all_its_blocks(self, cache):
        served(cache, range(8))
        assert cache.evict(1) == 2
        assert served(cache, range(9)) == 4


def test_where_no_group_keeps_all_a_text_is_known_by_its_end():
    cache = RadixPrefixCache(BlockPool(40, SIZE, (6,)))
    served(cache, range(60))
    cache.evict(13)
    assert served(cache, [*range(60), 99]) == 60
    cache.evict(1)
    list(cache.check())
    cache.evict(40)
    assert list(cache.check()) == []
    assert not cache.root.branches, "nothing is left of the way to what is gone"


def test_a_tier_gives_whole_blocks_of_all_groups():
    tier = OffloadIndex(40, "model")
    cache = RadixPrefixCache(BlockPool(40, SIZE, (None, 6)), (), tier)
    served(cache, range(20))
    cache.evict(40)
    saves = tier.take_saves()
    assert len({save.name for save in saves}) == len(saves) == 10
    found = cache.path(ME).offloaded(range(30), 9)
    assert {name for _, name in found} == {save.name for save in saves}
    tier.drop(found[5][1])
    assert len(cache.path(ME).offloaded(range(30), 9)) == 4, "of the third block one group's is missing"


class Bench:
    """A scheduler with a group that keeps all and one with a window of 6, and a model that finds every mistake."""

    def __init__(self, blocks, *, tokens=8, seqs=4, max_model_len=100, windows=(None, 6), cached=True):
        self.pool = BlockPool(blocks, SIZE, windows)
        cache = RadixPrefixCache(self.pool) if cached else None
        config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens)
        self.scheduler = Scheduler(config, self.pool, max_model_len, prefix_cache=cache)
        self.model = PagedModel(blocks, SIZE, max_tokens=tokens, max_seqs=seqs, windows=windows)
        self.said = {}
        self.held = []

    def add(self, name, prompt, **sampling):
        sequences = self.scheduler.add(Request(name, tuple(prompt), SamplingParams(**sampling)))
        self.said |= {s.sequence_id: [] for s in sequences}
        return sequences

    def step(self):
        scheduled = self.scheduler.schedule()
        self.held.append(sum(s.table.num_held for s in self.scheduler._running.values()))
        for sequence, token in self.scheduler.update(scheduled, self.model.execute(scheduled)):
            self.said[sequence.sequence_id].append(token.token_id)
        self.scheduler.check()
        return scheduled

    def run(self):
        while self.scheduler.has_work():
            self.step()


def test_a_long_sequence_holds_what_it_sees():
    bench = Bench(40, tokens=8)
    bench.add("a", range(40), max_tokens=9)
    bench.run()
    # Chunks of 8: the full group grows by 2 a step, the other holds 8 new tokens and those that the first one sees.
    assert bench.held[:5] == [2 + 2, 4 + 4, 6 + 4, 8 + 4, 10 + 4]
    assert max(bench.held[5:]) == 12 + 3
    assert bench.said[0] == expected_tokens(range(40), 0, max_length=49)


def test_a_request_fits_alone_where_its_windows_do():
    """48 tokens are 12 blocks of one group and at most 5 of the other, of which 24 would be too many otherwise."""
    bench = Bench(17, tokens=8, cached=False)
    assert bench.scheduler.limits.max_length == 48
    bench.add("a", range(40), max_tokens=8)
    bench.run()
    assert bench.said[0] == expected_tokens(range(40), 0, max_length=48)
    assert bench.scheduler.num_preemptions == 0
    assert bench.pool.num_free == 17


def test_more_sequences_run_at_a_time_than_without_windows():
    def running(windows, blocks):
        bench = Bench(blocks, tokens=8, windows=windows)
        for name in "abcd":
            bench.add(name, range(ord(name), ord(name) + 32), max_tokens=20)
        most = 0
        while bench.scheduler.has_work():
            bench.step()
            most = max(most, bench.scheduler.num_running)
        return most

    assert running((None, 6), 48) > running((None, None), 48)


def test_sequences_that_share_a_prompt_share_its_window():
    bench = Bench(60, tokens=12)
    sequences = bench.add("a", range(30), max_tokens=10, n=3)
    bench.run()
    for s in sequences:
        assert bench.said[s.sequence_id] == expected_tokens(range(30), s.index, max_length=40)


def test_a_preempted_sequence_says_the_same():
    bench = Bench(24, tokens=12, max_model_len=48)
    for name in "abc":
        bench.add(name, range(ord(name), ord(name) + 10), max_tokens=30)
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    for index, name in enumerate("abc"):
        assert bench.said[index] == expected_tokens(range(ord(name), ord(name) + 10), 0, max_length=40)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("windows", [(None, 6), (None, 9, 5), (7,)])
def test_steps_taken_at_once_leave_what_single_steps_leave(windows, cached):
    def pool_after(at_once):
        bench = Bench(44, tokens=12, windows=windows, cached=cached)
        for name, length in (("a", 11), ("b", 6), ("c", 14)):
            bench.add(name, [ord(name)] * length, max_tokens=40, ignore_eos=True)
        for _ in range(5):
            scheduled = bench.scheduler.schedule()
            bench.scheduler.update(scheduled, answers(scheduled))
        trail = []
        while bench.scheduler.has_work() and len(trail) < 40:
            steps = bench.scheduler.steady_steps(7) if at_once else 0
            if steps > 1:
                bench.scheduler.skip(steps, dict.fromkeys(bench.scheduler.running_ids, 7))
            else:
                scheduled = bench.scheduler.schedule()
                bench.scheduler.update(scheduled, answers(scheduled))
            bench.scheduler.check()
            trail.append(bench.scheduler.has_work())
        return bench

    one, other = pool_after(False), pool_after(True)
    for bench in (one, other):
        while bench.scheduler.has_work():
            scheduled = bench.scheduler.schedule()
            bench.scheduler.update(scheduled, answers(scheduled))
    pools = [(b.pool._free, list(b.pool._idle), list(b.pool._spare), b.scheduler._step) for b in (one, other)]
    assert pools[0] == pools[1]


def answers(scheduled):
    """What a model that always says 7 gives."""
    from kvarn.step import SampledToken, StepOutput

    return StepOutput(scheduled.step, tuple(SampledToken(p.sequence_id, 7) for p in scheduled.sequences if p.sample))


def test_a_table_of_one_group_has_no_holes():
    table = BlockTable(BlockPool(9, SIZE))
    table.prepare_write(0, 30)
    table.slide(30)
    assert HOLE not in table.ids[0]
