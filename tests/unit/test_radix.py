"""The radix prefix cache: what a sequence finds, what it may not find, and what goes first."""

import pytest

from kvarn.cache import BlockPool, RadixPrefixCache, new_tables

SIZE = 4
ME, OTHER = ("", "mine"), ("", "other")


class Writer:
    """One sequence as the scheduler would have it."""

    def __init__(self, cache, salt=ME):
        self.cache = cache
        self.table = new_tables(cache.pool)
        self.path = cache.path(salt)
        self.known = 0

    def start(self, tokens, **how):
        """Goes on from the cache; returns how many tokens were found."""
        self.tokens = list(tokens)
        self.known = self.path.adopt(self.tokens, self.table, self.known, **how)
        return self.known

    def compute(self, tokens=None):
        """Computes all tokens, which go on from those so far."""
        self.tokens = list(self.tokens if tokens is None else tokens)
        missing = self.table.blocks_needed(self.known, len(self.tokens)) - self.cache.pool.num_free
        self.cache.evict(max(0, missing))
        copies = self.table.prepare_write(self.known, len(self.tokens))
        self.known = len(self.tokens)
        self.path.insert(self.tokens, self.known, self.table)
        return copies

    def end(self):
        self.path.leave(self.tokens, self.known, self.table)
        self.table.release()
        self.known = 0

    def disown(self):
        self.path.disown(self.tokens, self.table)
        self.known = 0


@pytest.fixture
def cache():
    return RadixPrefixCache(BlockPool(32, SIZE))


def computed(cache, tokens, salt=ME):
    """The blocks of a sequence that has come and gone."""
    writer = Writer(cache, salt)
    writer.start(tokens)
    writer.compute()
    (blocks,) = writer.table.ids
    writer.end()
    return blocks


def found(cache, tokens, salt=ME):
    writer = Writer(cache, salt)
    count = writer.start(tokens)
    writer.end()
    return count


def test_an_empty_cache_knows_nothing(cache):
    assert found(cache, range(10)) == 0


def test_the_same_tokens_get_the_same_blocks_but_for_the_last_token(cache):
    blocks = computed(cache, range(10))
    writer = Writer(cache)
    assert writer.start(range(10)) == 9
    assert writer.table.ids == (blocks,)


@pytest.mark.parametrize(("same", "hit"), [(0, 0), (1, 1), (3, 3), (4, 4), (5, 5), (8, 8), (9, 9), (10, 10)])
def test_a_match_goes_to_the_token(cache, same, hit):
    computed(cache, range(10))
    assert found(cache, [*range(same), *range(100, 110)]) == hit


def test_a_block_is_found_only_after_the_same_tokens(cache):
    computed(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    assert found(cache, [5, 6, 7, 8, 9]) == 0
    assert found(cache, [1, 2, 3, 0, 5, 6, 7, 8, 9]) == 3


def test_the_next_turn_of_a_conversation_computes_its_new_tokens_only(cache):
    computed(cache, range(15))
    assert found(cache, range(22)) == 15


def test_what_ends_inside_a_block_is_copied_before_it_is_written(cache):
    blocks = computed(cache, range(10))
    writer = Writer(cache)
    writer.start([*range(9), 77, 78])
    ((source, copy),) = writer.compute()
    assert source == blocks[2]
    assert writer.table.ids == ((*blocks[:2], copy),)
    writer.end()
    assert found(cache, range(12)) == 10, "the first is as it was"
    assert found(cache, [*range(9), 77, 78, 79]) == 11


def test_blocks_of_a_running_sequence_are_found_as_soon_as_they_are_full(cache):
    first, second = Writer(cache), Writer(cache)
    first.start(range(20))
    first.compute(range(9))
    assert second.start(range(20)) == 8, "two blocks are full; the third is still being written"
    assert second.table.ids[0] == first.table.ids[0][:2]


def test_one_goes_on_from_what_another_has_computed_meanwhile(cache):
    first, second = Writer(cache), Writer(cache)
    second.start(range(20))
    second.compute(range(5))
    first.start(range(20))
    first.compute(range(16))
    assert second.start(range(20), whole_blocks=True) == 16
    assert second.table.ids == first.table.ids
    cache.pool.check([first.table.held, second.table.held, cache.check()])


def test_whole_blocks_only_where_a_copy_is_not_wanted(cache):
    computed(cache, range(10))
    writer = Writer(cache)
    assert writer.start(range(12), whole_blocks=True) == 8
    assert len(writer.table) == 2


def test_what_two_compute_at_the_same_time_is_kept_once(cache):
    first, second = Writer(cache), Writer(cache)
    for writer in (first, second):
        writer.start(range(12))
    first.compute()
    assert cache.pool.num_free == 32 - 3
    second.compute()
    assert second.table.ids == first.table.ids
    assert cache.pool.num_free == 32 - 3


def test_a_longer_text_replaces_its_beginning_in_a_block(cache):
    computed(cache, range(6))
    computed(cache, range(8))
    assert len(list(cache.check())) == 2
    computed(cache, range(7))
    assert len(list(cache.check())) == 2


def test_a_partly_filled_block_that_somebody_else_holds_is_not_kept(cache):
    writer = Writer(cache)
    writer.start(range(6))
    writer.compute()
    fork, path = writer.table.fork(5), writer.path.fork(5)
    path.leave(list(range(5)), 5, fork)
    fork.release()
    assert found(cache, range(6)) == 4
    assert writer.table.prepare_write(6, 7) == [], "so the writer needs no copy"


def test_a_fork_above_its_parent_files_below_the_right_node(cache):
    writer = Writer(cache)
    writer.start(range(8))
    writer.compute()
    fork, path = writer.table.fork(7), writer.path.fork(7)
    assert path.num_blocks == 1
    fork.prepare_write(7, 9)
    path.insert([*range(7), 50, 51], 9, fork)
    assert found(cache, [*range(7), 50, 51]) == 8
    cache.pool.check([writer.table.held, fork.held, cache.check()])


class TestEviction:
    def test_only_what_no_table_holds_goes(self, cache):
        writer = Writer(cache)
        writer.start(range(12))
        writer.compute()
        assert cache.evict(5) == 0
        writer.end()
        assert cache.evict(5) == 3
        assert cache.pool.num_free == 32
        assert found(cache, range(12)) == 0
        assert cache.num_evicted_tokens == 12

    def test_leaves_go_first(self, cache):
        computed(cache, range(12))
        for left in (8, 4, 0):
            cache.evict(1)
            assert found(cache, range(20)) == left

    def test_what_was_used_last_stays(self, cache):
        for first in (10, 20, 30):
            computed(cache, range(first, first + 4))
        found(cache, [*range(10, 14), 0])
        cache.evict(1)
        assert [found(cache, [*range(first, first + 4), 0]) for first in (10, 20, 30)] == [4, 0, 4]

    def test_a_beginning_that_is_shared_outlives_its_continuations(self, cache):
        computed(cache, [*range(8), *range(20, 24)])
        computed(cache, [*range(8), *range(30, 34)])
        assert cache.evict(2) == 2
        assert found(cache, [*range(8), 0]) == 8

    def test_no_more_is_kept_than_the_pool_has(self, cache):
        for text in range(200):
            computed(cache, range(text * 10, text * 10 + 10), salt=("", str(text)))
        assert cache.pool.num_available == 32
        assert len(cache.root.branches) <= 32, "a salt goes with its last block"


class TestSalts:
    def test_nobody_finds_what_another_salt_computed(self, cache):
        computed(cache, range(12), salt=OTHER)
        assert found(cache, range(12), salt=ME) == 0
        assert found(cache, range(12), salt=("tenant", "other")) == 0
        assert found(cache, range(12), salt=OTHER) == 11

    def test_the_parts_of_a_salt_do_not_run_into_one_another(self, cache):
        computed(cache, range(12), salt=("ab", "c"))
        assert found(cache, range(12), salt=("a", "bc")) == 0

    def test_two_salts_about_to_compute_the_same_do_not_wait_for_one_another(self, cache):
        mine, same, others = (cache.path(salt).next_block(range(8)) for salt in (ME, ME, OTHER))
        assert mine == same != others


def running(cache, tokens, salt=ME):
    """A sequence that has computed its tokens and goes on."""
    writer = Writer(cache, salt)
    writer.start(tokens)
    writer.compute()
    return writer


class TestWhatIsNotBelieved:
    def test_it_is_found_by_nobody_whoever_computed_it(self, cache):
        computed(cache, range(10))
        computed(cache, [*range(4), 50, 51, 52, 53, 54])
        computed(cache, [9, *range(10)])
        running(cache, range(14)).disown()
        assert found(cache, range(14)) == 0
        assert found(cache, [*range(4), 50, 51, 52, 53, 54]) == 0, "it went on from what is not believed"
        assert found(cache, [9, *range(10)]) == 10
        cache.pool.check([cache.check()])

    def test_what_others_go_on_from_stays_until_they_go(self, cache):
        other = running(cache, [*range(8), 70, 71, 72, 73, 74])
        computed(cache, [*range(8), 60, 61, 62])
        running(cache, range(14)).disown()
        assert found(cache, [*range(8), 60, 61, 62, 63]) == 11, "who goes on believes what all of them begin with"
        assert found(cache, [*range(8), 70, 71, 72, 73, 74]) == 12
        assert found(cache, range(14)) == 8
        cache.pool.check([other.table.held, cache.check()])
        other.disown()
        assert cache.pool.num_free == cache.pool.num_blocks

    def test_a_part_of_a_block_that_was_copied_goes_too(self, cache):
        computed(cache, [1, 2, 3])
        computed(cache, [2, 2, 3])
        writer = Writer(cache)
        assert writer.start([1, 2, 7]) == 2
        writer.compute()
        writer.disown()
        assert found(cache, [1, 2, 3, 4]) == 0
        assert found(cache, [2, 2, 3, 4]) == 3

    def test_another_salt_keeps_its_own(self, cache):
        computed(cache, range(10), salt=OTHER)
        running(cache, range(10)).disown()
        assert (found(cache, range(10)), found(cache, range(10), salt=OTHER)) == (0, 9)

    def test_declared_prefixes_are_computed_again(self):
        cache = RadixPrefixCache(BlockPool(32, SIZE), [range(8)])
        computed(cache, range(10), salt=OTHER)
        running(cache, range(10)).disown()
        assert found(cache, range(10), salt=OTHER) == 0
        assert cache.pool.num_free == 32
        computed(cache, range(10))
        assert found(cache, range(10), salt=OTHER) == 8
        cache.pool.check([cache.check()])

    def test_where_no_group_keeps_all_the_end_of_a_text_stays_while_it_is_held(self):
        cache = RadixPrefixCache(BlockPool(32, SIZE, (5,)))
        other = running(cache, range(30))
        other.table.slide(30)
        running(cache, range(10)).disown()
        assert found(cache, range(10)) == 0
        cache.pool.check([other.table.held, cache.check()])
        other.end()
        assert found(cache, range(31)) == 30


class TestSharedPrefixes:
    @pytest.fixture
    def cache(self):
        return RadixPrefixCache(BlockPool(32, SIZE), [range(10), [0, 1, 2, 3, 9, 9, 9, 9], [7]])

    def test_whole_blocks_are_common_and_the_rest_is_private(self, cache):
        computed(cache, range(14), salt=OTHER)
        assert found(cache, range(14), salt=ME) == 8
        assert found(cache, range(14), salt=OTHER) == 13

    def test_they_are_never_evicted(self, cache):
        computed(cache, range(14))
        assert cache.evict(32) == 2
        assert found(cache, range(14), salt=OTHER) == 8

    def test_what_several_begin_with_is_reserved_once(self, cache):
        assert cache.num_reserved == 3

    def test_a_text_that_leaves_a_prefix_is_private_from_there(self, cache):
        computed(cache, range(14), salt=OTHER)
        computed(cache, [*range(6), 50, 51, 52], salt=OTHER)
        assert found(cache, [*range(6), 50, 51, 52], salt=ME) == 6
        assert found(cache, [*range(6), 50, 51, 52], salt=OTHER) == 8

    def test_salts_wait_for_one_another_within_a_prefix_only(self, cache):
        mine, others = Writer(cache, ME), Writer(cache, OTHER)
        assert mine.path.next_block(range(14)) == others.path.next_block(range(14))
        computed(cache, range(10))
        assert [writer.start(range(14)) for writer in (mine, others)] == [10, 8]
        assert mine.path.next_block(range(14)) != others.path.next_block(range(14))
