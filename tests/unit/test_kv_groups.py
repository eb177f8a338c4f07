"""How layers are divided into KV groups: equal in places, one window each, and wasting as little as can be."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvarn.kv_types import KV_TYPES
from kvarn.program import KvLayer
from kvarn.program.kv_groups import MOST_GROUPS, kv_groups


def layers(*windows, heads=2):
    return [KvLayer(heads, 16, 16, window) for window in windows]


def every_sixth(count, window=512):
    return layers(*(None if i % 6 == 5 else window for i in range(count)))


def test_layers_of_one_kind_are_one_group_with_a_slot_each():
    for window in (None, 100):
        groups = kv_groups(layers(window, window, window), 4096)
        assert (groups.windows, groups.places) == ((window,), ((0, 0), (0, 1), (0, 2)))
        assert len(groups.slots) == 3


def test_gemma_3_270m_is_six_groups_of_three():
    groups = kv_groups(every_sixth(18), 32768)
    assert groups.windows == (None, 512, 512, 512, 512, 512)
    assert len(groups.slots) == 3
    assert [groups.places[i] for i in (5, 11, 17)] == [(0, 0), (0, 1), (0, 2)]
    assert [groups.places[i] for i in (0, 1, 2, 3, 4, 6)] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert groups.block_bytes(KV_TYPES["float16"], 16) == 3 * 2 * 16 * 2 * 2 * 16


@pytest.mark.parametrize(
    ("count", "size", "number"),
    [
        (26, 2, 13),  # 4 and 22
        (34, 5, 7),  # 5 and 29, one place empty behind a window; 1 would waste none, but be 34 groups
        (62, 5, 13),  # 10 and 52
    ],
)
def test_the_size_wastes_least(count, size, number):
    groups = kv_groups(every_sixth(count), 131072)
    assert (len(groups.slots), len(groups)) == (size, number)


def test_a_window_as_long_as_the_longest_text_is_none():
    assert kv_groups(layers(None, 512), 512).windows == (None,)


def test_layers_of_different_shapes_are_one_group_that_keeps_all():
    mixed = [KvLayer(2, 16, 16, 100), KvLayer(4, 16, 16, None)]
    groups = kv_groups(mixed, 4096)
    assert (groups.windows, groups.slots) == ((None,), tuple(mixed))


def test_a_program_without_attention_has_a_group_without_slots():
    assert (kv_groups([], 10).windows, kv_groups([], 10).slots) == ((None,), ())


@given(st.lists(st.sampled_from([None, 30, 70]), min_size=1, max_size=40))
def test_every_layer_has_a_place_of_its_own_in_a_group_of_its_window(windows):
    groups = kv_groups(layers(*windows), 1000)
    assert len(set(groups.places)) == len(windows)
    for window, (group, slot) in zip(windows, groups.places, strict=True):
        assert groups.windows[group] == window
        assert slot < len(groups.slots)
    assert len(groups) <= MOST_GROUPS
    assert {group for group, _ in groups.places} == set(range(len(groups))), "no group is empty"
