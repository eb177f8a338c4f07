"""The second tier: which block is in which slot, and when it is worth it."""

import pytest
from paged_model import PagedModel
from virtual_time import LinearCost

from kvarn.cache import BlockPool, OffloadIndex, RadixPrefixCache, new_tables
from kvarn.config import SchedulerConfig
from kvarn.request import Request, SamplingParams
from kvarn.scheduler import MeasuredCost, MoveCost, PriorityClasses, Scheduler, StepShape

SIZE = 4
ME, OTHER = ("", "mine"), ("", "other")


def names_of(cache, tokens, salt, slots=8):
    """The names under which the whole blocks of a text are saved when they are evicted."""
    table, path = new_tables(cache.pool), cache.path(salt)
    table.prepare_write(0, len(tokens))
    path.leave(list(tokens), len(tokens), table)
    table.release()
    cache.evict(slots)
    return [save.name for save in cache.tier.take_saves()]


def new_cache(identity="model", slots=8, prefixes=()):
    return RadixPrefixCache(BlockPool(8, SIZE), prefixes, OffloadIndex(slots, identity))


def test_evicted_blocks_are_found_by_what_follows_a_place():
    cache = new_cache()
    saved = names_of(cache, range(10), ME)
    found = cache.path(ME).offloaded(range(12), 9)
    assert [name for _, name in found] == saved[::-1], "the last block of a text goes first; its rest is not saved"
    assert len(found) == 2
    assert len(cache.path(ME).offloaded(range(12), 1)) == 1
    assert len(cache.path(ME).offloaded(range(8), 9)) == 1, "the last token is computed"
    assert cache.path(ME).offloaded([*range(4), 9, 9, 9, 9, 9], 9) == found[:1]


def test_what_is_not_believed_goes_from_the_tier_too():
    cache = new_cache()
    names_of(cache, [*range(8), 9], ME)
    names_of(cache, [9] * 8, ME)
    assert (len(cache.tier), len(cache.path(ME).offloaded(range(12), 9))) == (4, 2)
    table, path = new_tables(cache.pool), cache.path(ME)
    table.prepare_write(0, 8)
    path.insert(range(9), 8, table)
    path.disown(range(9), table)
    assert len(cache.tier) == 2
    assert cache.path(ME).offloaded(range(12), 9) == []
    cache.tier.check()


def test_names_differ_by_tokens_before_salt_and_identity():
    texts = [(range(8), ME), (range(8), OTHER), (range(8), ("mine", "")), ([0, 0, 0, 0, 4, 5, 6, 7], ME)]
    names = {name for tokens, salt in texts for name in names_of(new_cache(), tokens, salt)}
    names |= set(names_of(new_cache("another model"), range(8), ME))
    assert len(names) == 10
    assert names_of(new_cache(), range(8), ME) == names_of(new_cache(), range(8), ME)


def test_a_declared_prefix_has_one_name_for_all_salts():
    cache = new_cache(prefixes=[range(4)])
    names_of(cache, range(8), ME)
    cache.spill_all()
    (common,) = cache.tier.take_saves()
    for salt in (ME, OTHER):
        other = new_cache(prefixes=[range(4)])
        other.tier = OffloadIndex(8, "model", {common.name: 3})
        assert other.path(salt).offloaded(range(12), 9) == [(3, common.name)]


def test_what_is_there_is_not_saved_again_and_the_least_recently_used_goes():
    tier = OffloadIndex(2)
    for number in (1, 2, 1, 3):
        tier.save(bytes([number]), number)
    assert [(save.block, save.slot) for save in tier.take_saves()] == [(1, 0), (2, 1), (3, 1)]
    assert [tier.find(bytes([number])) for number in (1, 2, 3)] == [0, None, 1]
    tier.drop(bytes([1]))
    assert tier.find(bytes([1])) is None
    tier.save(bytes([4]), 4)
    assert tier.take_saves()[0].slot == 0
    tier.check()


COST = LinearCost(fixed=5.0, token=1e-3, sampled=2.0, attended=1e-5)
"""16 tokens: 16 ms, and 1.36 ms for what they see of one another; 16 more for every 100 before them."""


def test_what_computing_blocks_takes_is_what_the_step_with_the_rest_takes_less_without_them():
    moves = MoveCost(16, 1.0, 1.0, COST)
    assert moves.compute_seconds(0, 1) == pytest.approx(0.016 + 1e-5 * 136)
    assert moves.compute_seconds(1000, 2) == pytest.approx(0.032 + 1e-5 * (32 * 1000 + 528))


def test_a_block_is_saved_where_saving_and_loading_it_takes_less_than_computing_it():
    assert MoveCost(16, 0.008, 0.009, COST).worth_saving()
    assert not MoveCost(16, 0.009, 0.009, COST).worth_saving()
    assert MoveCost(16, 0.0, 0.0, COST).worth_saving()


def test_a_block_is_loaded_where_loading_alone_takes_less_than_computing_it_there():
    moves = MoveCost(16, 1.0, 0.018, COST)
    assert not moves.worth_saving() and not moves.worth_loading(0, 1)
    assert moves.worth_loading(100, 1), "its tokens look at more"
    assert moves.worth_loading(0, 20), "so do the last ones of many"


def test_what_the_engine_learns_of_its_steps_decides():
    cost = MeasuredCost()
    moves = MoveCost(16, 0.004, 0.004, cost)
    for tokens in (1, 64, 128) * 20:
        shape = StepShape(0, 0, 0, 0).plus(0, tokens)
        cost.observe(shape, 0.01 + 0.001 * tokens)
    assert moves.compute_seconds(0, 1) == pytest.approx(0.016, rel=0.05)
    assert moves.worth_saving() and moves.worth_loading(0, 1)
    for tokens in (1, 64, 128) * 200:
        shape = StepShape(0, 0, 0, 0).plus(0, tokens)
        cost.observe(shape, 0.01 + 0.0001 * tokens)
    assert not moves.worth_saving() and not moves.worth_loading(0, 1)


@pytest.mark.parametrize(("token", "swaps"), [(0.01, True), (0.0001, False)])
def test_a_preempted_sequence_is_swapped_where_the_model_of_steps_says_that_is_cheaper(token, swaps):
    """Two sequences, room for one and a half: the second is preempted by the first, and evicted."""
    pool = BlockPool(12, 4)
    cache = RadixPrefixCache(pool, (), OffloadIndex(40, "model"))
    moves = MoveCost(4, 0.002, 0.002, LinearCost(token=token, attended=0.0))
    scheduler = Scheduler(SchedulerConfig(2, 16), pool, 48, prefix_cache=cache, moves=moves)
    model = PagedModel(12, 4, max_tokens=16, max_seqs=2)
    first, second = (
        scheduler.add(Request(name, tuple(range(at, at + 15)), SamplingParams(max_tokens=25)))[0]
        for name, at in (("first", 0), ("second", 20))
    )
    saves, loads, computed = 0, 0, 0
    while scheduler.has_work():
        step = scheduler.schedule()
        saves += len(step.block_saves)
        loads += sum(len(load.blocks) for load in step.block_loads)
        computed += step.num_tokens
        scheduler.update(step, model.execute(step))
        scheduler.check()
    assert second.num_preemptions > 0 == first.num_preemptions
    assert (saves > 0, loads > 0) == (swaps, swaps)
    again = computed - first.num_tokens - second.num_tokens + 2
    in_no_whole_block = 3 * second.num_preemptions
    assert (again <= in_no_whole_block) == swaps


def test_a_sequence_is_loaded_once_a_step_however_often_it_is_looked_at():
    """What is before a running prompt in order is looked at before each of its chunks, and at the end."""
    pool = BlockPool(24, 4)
    cache = RadixPrefixCache(pool, (), OffloadIndex(40, "model"))
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=12)
    scheduler = Scheduler(config, pool, 60, policy=PriorityClasses(), prefix_cache=cache)
    model = PagedModel(24, 4, max_tokens=12, max_seqs=4)

    def step():
        scheduled = scheduler.schedule()
        scheduler.update(scheduled, model.execute(scheduled))
        scheduler.check()
        return scheduled

    def serve(name, text, priority=0):
        return scheduler.add(Request(name, tuple(text), SamplingParams(max_tokens=2), priority))[0]

    for name in range(5):
        serve(str(name), range(name, name + 40))
        while scheduler.has_work():
            step()
    assert pool.num_free < 10
    low = serve("low", range(20, 60), priority=1)
    step()
    again = serve("again", range(40))
    loads = step().block_loads
    assert [load.sequence_id for load in loads] == [again.sequence_id]
    while scheduler.has_work():
        step()
    assert again.num_cached_tokens >= 4 * len(loads[0].blocks)
    assert low.num_output_tokens == again.num_output_tokens == 2
