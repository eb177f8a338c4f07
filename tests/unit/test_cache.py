"""Blocks: references, sharing and copy-on-write."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.cache import BlockPool, BlockTable, NullPrefixCache, OutOfBlocksError, blocks_for


def test_a_pool_hands_out_every_block_once():
    pool = BlockPool(4, 16)
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]
    assert pool.num_free == 0


def test_asking_for_too_many_takes_none():
    pool = BlockPool(4, 16)
    pool.allocate(2)
    with pytest.raises(OutOfBlocksError, match="3 blocks asked for, 2 of 4 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_shared_block_is_free_after_its_last_owner():
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.free(blocks)
    assert pool.num_free == 1
    pool.free(blocks)
    assert pool.num_free == 2


def test_double_free_and_sharing_a_free_block_are_refused():
    pool = BlockPool(2, 16)
    with pytest.raises(ValueError, match="freed twice"):
        pool.free([0])
    with pytest.raises(ValueError, match="is free"):
        pool.share([0])


def test_check_finds_a_lost_and_a_doubly_owned_block():
    pool = BlockPool(3, 16)
    table = BlockTable(pool)
    table.prepare_write(0, 20)
    pool.check([table.held])
    with pytest.raises(AssertionError, match="1 references counted, 0 found"):
        pool.check([])
    with pytest.raises(AssertionError, match="1 references counted, 2 found"):
        pool.check([table.held, table.held[:1]])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for(tokens, blocks):
    assert blocks_for(tokens, 16) == blocks


def test_a_table_grows_by_whole_blocks():
    pool = BlockPool(4, 16)
    table = BlockTable(pool)
    assert table.prepare_write(0, 16) == []
    assert len(table) == 1
    assert table.blocks_needed(16, 17) == 1
    assert table.prepare_write(16, 17) == []
    assert table.blocks_needed(17, 32) == 0
    table.release()
    assert pool.num_free == 4


def test_the_ids_are_one_object_until_the_table_changes():
    pool = BlockPool(4, 16)
    table = BlockTable(pool)
    table.prepare_write(0, 16)
    before = table.ids
    table.prepare_write(3, 16)
    assert table.ids is before
    table.prepare_write(16, 17)
    assert table.ids == ((*before[0], table[1]),)


def test_a_write_into_a_partly_filled_shared_block_copies_it():
    pool = BlockPool(6, 16)
    parent = BlockTable(pool)
    parent.prepare_write(0, 20)
    child = parent.fork(18)
    assert child.ids == parent.ids
    assert child.blocks_needed(18, 19) == 1
    ((source, copy),) = child.prepare_write(18, 19)
    assert source == parent[1]
    assert child.ids == ((parent[0], copy),)
    assert parent.prepare_write(20, 21) == [], "the last owner writes in place"
    pool.check([parent.held, child.held])


def test_a_write_at_the_start_of_a_shared_block_replaces_it_without_a_copy():
    pool = BlockPool(6, 16)
    parent = BlockTable(pool)
    parent.prepare_write(0, 32)
    child = parent.fork(32)
    (before,) = parent.ids
    assert child.prepare_write(16, 17) == []
    assert child[0] == before[0]
    assert child[1] not in before


def test_a_fork_at_a_block_border_shares_whole_blocks_only():
    pool = BlockPool(6, 16)
    parent = BlockTable(pool)
    parent.prepare_write(0, 33)
    child = parent.fork(32)
    assert child.ids[0] == parent.ids[0][:2]
    assert child.blocks_needed(32, 33) == 1
    assert child.prepare_write(32, 33) == []


@given(st.data())
def test_no_block_is_lost_or_owned_twice(data):
    pool = BlockPool(data.draw(st.integers(1, 24)), 4)
    tables: list[tuple[BlockTable, int]] = []
    for _ in range(data.draw(st.integers(0, 30))):
        action = data.draw(st.sampled_from(["new", "write", "fork", "release"]))
        if action == "new" or not tables:
            tables.append((BlockTable(pool), 0))
            continue
        index = data.draw(st.integers(0, len(tables) - 1))
        table, length = tables[index]
        if action == "write":
            end = length + data.draw(st.integers(1, 9))
            needed = table.blocks_needed(length, end)
            before = pool.num_free
            if needed > before:
                continue
            copies = table.prepare_write(length, end)
            assert before - pool.num_free == needed, "blocks_needed says exactly what a write takes"
            assert all(pool.references(b) == 1 for b in table.ids[0][length // 4 :]), "what is written is not shared"
            assert all(source != copy for source, copy in copies)
            tables[index] = table, end
        elif action == "fork":
            shared = data.draw(st.integers(0, length))
            tables.append((table.fork(shared), shared))
        else:
            table.release()
            del tables[index]
        pool.check(t.held for t, _ in tables)
    for table, _ in tables:
        table.release()
    assert pool.num_free == pool.num_blocks


def test_the_null_prefix_cache_finds_nothing():
    pool = BlockPool(4, 2)
    cache, table = NullPrefixCache(), BlockTable(pool)
    path = cache.path(("", ""))
    table.prepare_write(0, 3)
    path.insert([1, 2, 3], 3, table)
    path.leave([1, 2, 3], 3, table)
    table.release()
    assert path.adopt([1, 2, 3], table, 0) == 0
    assert cache.evict(3) == 0
    assert pool.num_free == 4
