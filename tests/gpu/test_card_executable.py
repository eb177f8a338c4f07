"""The CUDA executable's cache, limits and end."""

import dataclasses

import numpy as np
import pytest
import torch
from card_models import BLOCK, assert_near, card, load, run
from hypothesis import given, settings
from hypothesis import strategies as st
from op_programs import OpProgram, ragged

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.cuda import executable as executable_module
from kvarn.backends.cuda.cache import KvStore
from kvarn.backends.cuda.card import check_types
from kvarn.backends.reference import ReferenceBackend
from kvarn.errors import CapacityError, ConfigError, EngineError
from kvarn.program import Input, KvLayer, Logits
from kvarn.program.kv_groups import one_group
from kvarn.testing.models import tiny_model

ONE = {"num_hidden_layers": 1}
BLOCKS = 6
KINDS = ["float16", "bfloat16", "float32", "int8", "fp8_e4m3"]


def store(device, kv):
    """A cache of two layers, and what is in its blocks: bytes that differ everywhere."""
    made = KvStore(tiny_model("llama").program.kv_groups, KvCacheSpec(BLOCKS, BLOCK, kv), torch.device(device))
    rng = np.random.default_rng(3)
    filled = [rng.integers(0, 120, made.block_bytes, dtype=np.uint8) for _ in range(BLOCKS)]
    for block, data in enumerate(filled):
        made.write_block(block, data)
    return made, filled


def blocks_of(made):
    out = [np.zeros(made.block_bytes, np.uint8) for _ in range(BLOCKS)]
    for block, data in enumerate(out):
        made.read_block(block, data)
    return out


@pytest.mark.parametrize("kv", KINDS)
def test_blocks_are_read_as_they_were_written(device, kv):
    made, filled = store(device, kv)
    assert made.block_bytes * BLOCKS == made.nbytes
    for got, wanted in zip(blocks_of(made), filled, strict=True):
        np.testing.assert_array_equal(got, wanted)
    for block, size in ((-1, made.block_bytes), (BLOCKS, made.block_bytes), (0, made.block_bytes - 1)):
        with pytest.raises(ValueError, match=r"block|bytes"):
            made.read_block(block, np.zeros(size, np.uint8))
        with pytest.raises(ValueError, match=r"block|bytes"):
            made.write_block(block, np.zeros(size, np.uint8))


pairs = st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(0, BLOCKS - 1)), max_size=8)


@settings(max_examples=25, deadline=None)
@given(chosen=pairs)
def test_blocks_are_copied_in_order(device, chosen):
    made, expected = store(device, "int8")
    made.copy_blocks(chosen)
    for source, destination in chosen:
        expected[destination] = expected[source]
    for got, wanted in zip(blocks_of(made), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("kv", KINDS)
def test_slots_are_moved_as_if_all_at_once(device, kv):
    made, filled = store(device, kv)
    slots = list(range(10, 40))
    rotated = [*slots[7:], *slots[:7]]
    made.move_slots(list(zip(slots, rotated, strict=True)))
    assert not np.array_equal(blocks_of(made)[1], filled[1])
    made.move_slots(list(zip(rotated, slots, strict=True)))
    made.move_slots([])
    for got, wanted in zip(blocks_of(made), filled, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("chosen", [[(-1, 0)], [(0, BLOCKS * BLOCK)], [(0, 2), (1, 2)]])
def test_moves_to_nowhere_or_of_two_to_one_are_refused(device, chosen):
    made, filled = store(device, "float16")
    with pytest.raises(ValueError, match=r"destination|source"):
        made.move_slots([(3, 4), *chosen])
    np.testing.assert_array_equal(blocks_of(made)[0], filled[0])


def test_layers_of_several_shapes(device):
    """Each slot of a block has the shape of its layer, and all of them are copied."""
    groups = one_group((KvLayer(2, 16, 16), KvLayer(1, 8, 24)))
    made = KvStore(groups, KvCacheSpec(BLOCKS, BLOCK, "float16"), torch.device(device))
    assert made.layer(0).keys.shape == (BLOCKS * BLOCK, 2, 16)
    assert made.layer(1).values.shape == (BLOCKS * BLOCK, 1, 24)
    assert made.block_bytes == BLOCK * 2 * (2 * 32 + 32)


def test_a_branch_is_taken_up_where_its_positions_are(device):
    """The keys of a draft, moved to the slot of its position, serve what comes after."""
    model = tiny_model("llama", **ONE)
    executable = load(card(device), model)
    ids = list(range(30, 50))
    run(executable, [(ids, 0)], [[3, 0]])
    run(executable, [([7, 8], 20)], [[3, 0]])
    wanted = run(executable, [([9], 21)], [[3, 0]])
    run(executable, [([8, 7], 20)], [[3, 0]])
    run(executable, [([7, 7], 20)], [[3, 0]])
    executable.move_slots([(5, 4)])  # position 21's key stands for another position: not what it would be
    assert not np.array_equal(run(executable, [([9], 21)], [[3, 0]]), wanted)
    run(executable, [([7], 20)], [[3, 0]])
    assert_near(run(executable, [([9], 21)], [[3, 0]]), wanted)


def test_batches_beyond_the_limits_are_refused(device):
    model = tiny_model("llama", **ONE)
    executable = load(card(device), model, limits=StepLimits(32, 1, 48, 3))
    good = ragged([(range(20), 0)], outputs=[16, 17, 18, 19])
    executable.execute(good)
    with pytest.raises(ValueError, match="at most 4"):
        executable.execute(ragged([(range(20), 0)], outputs=[15, 16, 17, 18, 19]))
    with pytest.raises(ValueError, match="33 tokens"):
        executable.execute(ragged([(range(33), 0)], outputs=[32]))
    with pytest.raises(ValueError, match="token id"):
        executable.execute(dataclasses.replace(good, token_ids=good.token_ids + 300))
    with pytest.raises(ValueError, match="slot"):
        executable.execute(dataclasses.replace(good, slot_mapping=good.slot_mapping + 1))


def test_what_cannot_be_is_refused_at_load(device):
    with pytest.raises(ConfigError, match=r"kv_cache_dtype must be one of float16.*not 'int4'"):
        load(card(device), tiny_model("llama", **ONE), kv="int4")
    with pytest.raises(ConfigError, match="at most 64"):
        load(card(device), tiny_model("gpt2", n_positions=64))


def test_types_that_a_card_is_too_old_for_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "an old card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    check_types("cuda", "bfloat16", "int8")
    with pytest.raises(ConfigError, match=r"kv_cache_dtype fp8_e4m3 needs .* 8\.9 or later; an old card has 8\.6"):
        check_types("cuda", "bfloat16", "fp8_e4m3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    check_types("cuda", "float16", "float16")
    for dtype, kv, said in (("bfloat16", "float16", "dtype"), ("float16", "bfloat16", "kv_cache_dtype")):
        with pytest.raises(ConfigError, match=rf"^{said} bfloat16 needs .* 8\.0"):
            check_types("cuda", dtype, kv)


def test_a_card_that_others_have_filled_is_no_crash(device, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated …")

    monkeypatch.setattr(executable_module, "KvStore", full)
    with pytest.raises(CapacityError, match=r"Tried to allocate 2\.00 GiB\. A smaller memory_utilization"):
        load(card(device), tiny_model("llama", **ONE))


def test_a_program_beside_another_shares_its_weights(device):
    """Such as heads over hidden states: the same bits as with weights of its own, which are not held twice."""
    model, backend = tiny_model("llama", **ONE), card(device, weights="int4")
    target = load(backend, model)
    p = OpProgram(16)
    p.buffer("x", 64)
    p.add(Input("x"))
    p.weight("lm_head.weight", model.tensor("lm_head.weight"))
    p.add(Logits(p.buffer("y", 259), "x", "lm_head.weight"))
    spec, limits = KvCacheSpec(1, BLOCK, "float32"), StepLimits(3, 1, 16, 2)
    alone = backend.load(p.program("y"), p, spec, limits)
    beside = backend.load(p.program("y"), p, spec, limits, beside=target, shared={"lm_head.weight"})
    assert alone.memory().weights > beside.memory().weights == 0
    rows = np.random.default_rng(2).standard_normal((3, 64)).astype(np.float32)
    for count in (1, 3):
        batch = dataclasses.replace(ragged([(range(count), 0)]), inputs={"x": rows[:count]})
        got, wanted = (one.execute(batch)["y"] for one in (beside, alone))
        np.testing.assert_array_equal(got, wanted)
        assert np.abs(got).max() > 0
    with pytest.raises(TypeError, match="beside"):
        backend.load(p.program("y"), p, spec, limits, beside=ReferenceBackend().load(p.program("y"), p, spec, limits))


def test_closing_twice_is_no_error(device):
    executable = load(card(device), tiny_model("llama", **ONE))
    executable.close()
    executable.close()
    with pytest.raises(EngineError, match="closed"):
        executable.execute(ragged([(range(3), 0)]))
    with pytest.raises(EngineError, match="closed"):
        executable.copy_blocks([(0, 1)])
