"""Keys and values in 4 bits: what the definition promises, and what the CPU back-end stores beside codes."""

from __future__ import annotations

import numpy as np
import pytest
from op_programs import OpProgram, ragged
from test_cpu_attention import attention_program

from kvarn import _native
from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend, available_isas
from kvarn.backends.reference import ReferenceBackend, int4
from kvarn.backends.reference.cache import layer_cache
from kvarn.errors import ConfigError
from kvarn.kv_types import CACHE_TYPES, KV_TYPES
from kvarn.program import Attention, KvLayer, KvWrite

ISAS = available_isas()


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 160, 256, 544])
def test_a_rotation_keeps_dot_products(dim):
    rng = np.random.default_rng(dim)
    q, k = rng.standard_normal((2, 50, dim)).astype(np.float32)
    rotated = np.einsum("td,nd->tn", int4.rotate(q, query=True), int4.rotate(k))
    np.testing.assert_allclose(rotated, q @ k.T, atol=1e-5 * dim)


def test_a_rotation_spreads_one_large_element():
    key = np.zeros((1, 64), np.float32)
    key[0, 5] = 64.0
    assert np.array_equal(np.abs(int4.rotate(key)), np.full((1, 64), 8.0))


def test_a_group_is_within_half_a_step():
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((200, 64)) * rng.uniform(0.1, 30, (200, 1))).astype(np.float32)
    groups = x.reshape(200, 2, 32)
    step = (groups.max(-1) - groups.min(-1)) / 15
    error = np.abs(int4.as_codes(x) - x).reshape(200, 2, 32).max(-1)
    assert (error <= 0.5 * step + 0.01 * np.abs(groups).max(-1)).all()


@pytest.mark.parametrize("value", [0.0, 1.5, -3e-7, 65504.0, 1e30, -1e30])
def test_a_constant_vector_is_stored_as_it_is(value):
    x = np.full((1, 32), value, np.float32)
    np.testing.assert_allclose(int4.as_codes(x), np.clip(x, -65504, 65504), rtol=1e-3, atol=1e-7)


def key_error(keys: np.ndarray, dtype: str) -> float:
    """Root mean square of the errors of products with random queries."""
    tokens, heads, dim = keys.shape
    cache = layer_cache(KvLayer(heads, dim, dim), tokens, dtype)
    slots = np.arange(tokens, dtype=np.int64)
    cache.write(slots, slots, keys, keys)
    q = np.random.default_rng(0).standard_normal((20, heads, dim)).astype(np.float32)
    scores = np.einsum("thd,nhd->htn", cache.prepared(q), cache.read(slots)[0])
    return float(np.sqrt(np.square(scores - np.einsum("thd,nhd->htn", q, keys)).mean()))


def test_what_all_keys_have_in_common_costs_no_precision():
    """Channels far from zero in every token, as models with a bias of keys have them, coarsen int8 but not int4."""
    keys = np.random.default_rng(1).standard_normal((160, 2, 64)).astype(np.float32)
    shifted = keys.copy()
    shifted[..., [9, 41]] += np.array([130.0, -145.0], np.float32)
    assert key_error(shifted, "int8") > 10 * key_error(keys, "int8")
    assert key_error(shifted, "int4") < 1.2 * key_error(keys, "int4")


def test_a_reference_block_has_whole_groups_of_tokens():
    p = attention_program(np.random.default_rng(1), 8, heads=1, kv_heads=1, dim=32)
    with pytest.raises(ConfigError, match="block_size"):
        ReferenceBackend().load(p.program("o"), p, KvCacheSpec(4, 8, "int4"), StepLimits(8, 1, 8))


@pytest.mark.parametrize("kv", CACHE_TYPES)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (256, 256), (80, 80), (24, 24), (5, 5), (96, 128)])
def test_the_planner_counts_the_bytes_of_the_cache(kv, key_dim, value_dim):
    for block_size in (16, 48):
        allocated = _native.kv_bytes([(3, key_dim, value_dim)] * 2, 64, block_size, kv)
        assert allocated == 2 * 64 * block_size * KvLayer(3, key_dim, value_dim).bytes_per_token(KV_TYPES[kv])


@pytest.mark.parametrize(
    "backend", [*(CpuBackend(2, isa) for isa in ISAS), ReferenceBackend()], ids=[*ISAS, "reference"]
)
@pytest.mark.parametrize("kv", CACHE_TYPES)
def test_a_sequence_goes_on_in_a_copy_of_its_blocks(backend, kv):
    """All that belongs to a block is copied: going on in the middle of a block gives the bits of going on in it."""
    p = attention_program(np.random.default_rng(4), 60, heads=4, kv_heads=2, dim=64)
    executable = backend.load(p.program("o"), p, KvCacheSpec(8, 32, kv), StepLimits(64, 2, 64))
    executable.execute(ragged([(range(41), 0)], block_size=32, tables=[[6, 1]], outputs=[]))
    executable.copy_blocks([(6, 2), (1, 5)])
    rest = [(range(41, 60), 41)]
    copied = executable.execute(ragged(rest, block_size=32, tables=[[2, 5]], outputs=[]))["o"].copy()
    wanted = executable.execute(ragged(rest, block_size=32, tables=[[6, 1]], outputs=[]))["o"].copy()
    executable.close()
    assert np.array_equal(copied, wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("alone", [False, True], ids=["fused", "a stage of its own"])
def test_threads_that_share_a_prompt_store_what_one_stores(isa, alone):
    """A key is written after the first one of its 16, wherever rows are cut."""
    tokens = 119
    p = OpProgram(tokens)
    rng = np.random.default_rng(5)
    for name, width in {"q": 4 * 32, "k": 2 * 32, "v": 2 * 32}.items():
        p.input(name, rng.standard_normal((tokens, width)))
    p.kv_layers.append(KvLayer(2, 32, 32))
    p.buffer("o", 4 * 32)
    p.add(KvWrite(0, "k", "v"))
    if alone:  # attention is not the only one to read the layer, so that it cannot write it
        p.buffer("o2", 4 * 32)
        p.add(Attention(0, "o2", "q", 4, 2, 32, 32**-0.5))
    p.add(Attention(0, "o", "q", 4, 2, 32, 32**-0.5))
    wanted = p.run(CpuBackend(1, isa), "o", kv="int4")
    for _ in range(20):
        assert np.array_equal(p.run(CpuBackend(4, isa), "o", kv="int4"), wanted)
