"""Attention over the paged cache on the CPU back-end, against the reference back-end."""

from __future__ import annotations

import numpy as np
import pytest
from op_programs import OpProgram, ragged

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend, available_isas
from kvarn.backends.reference import ReferenceBackend
from kvarn.kv_types import CACHE_TYPES
from kvarn.program import Attention, KvLayer, KvWrite

ISAS = available_isas()


def attention_program(rng, tokens, *, heads, kv_heads, dim, window=None, softcap=None, spread=1.0):
    """q, k and v straight from tables, so that both back-ends cache the same numbers."""
    p = OpProgram(tokens)
    for name, count in {"q": heads, "k": kv_heads, "v": kv_heads}.items():
        p.input(name, rng.standard_normal((tokens, count * dim)) * spread)
    p.kv_layers.append(KvLayer(kv_heads, dim, dim, window))
    p.buffer("o", heads * dim)
    p.add(KvWrite(0, "k", "v"))
    p.add(Attention(0, "o", "q", heads, kv_heads, dim, dim**-0.5, window, softcap))
    return p


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "softcap"),
    [
        (1, 1, 16, None, None),
        (9, 3, 64, None, None),
        (4, 4, 80, None, None),
        (14, 2, 64, 100, None),
        (4, 1, 256, 512, 20.0),
        (3, 1, 24, 1, None),
        (2, 2, 8, 65, 5.0),
        (5, 5, 6, None, None),
        (8, 1, 128, None, None),
    ],
)
@pytest.mark.parametrize("kv", CACHE_TYPES)
def test_one_sequence_of_many_tiles(isa, heads, kv_heads, dim, window, softcap, kv):
    rng = np.random.default_rng(heads * dim)
    tokens = 150 if isa == "scalar" else 600
    p = attention_program(rng, tokens, heads=heads, kv_heads=kv_heads, dim=dim, window=window, softcap=softcap)
    got = p.run(CpuBackend(threads=2, isa=isa), "o", kv=kv)
    wanted = p.run(ReferenceBackend(), "o", kv=kv)
    np.testing.assert_allclose(got, wanted, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_large_scores_keep_their_softmax(isa):
    """Scores of up to about 350, which float32 rounds by 3e-5: exponentials span all of its range."""
    p = attention_program(np.random.default_rng(2), 200, heads=4, kv_heads=2, dim=32, spread=4.0)
    got = p.run(CpuBackend(threads=1, isa=isa), "o")
    np.testing.assert_allclose(got, p.run(ReferenceBackend(), "o"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("window", [None, 70])
def test_ragged_batches_over_scattered_blocks(isa, block_size, window):
    """Prefill, chunk and decode in one step; blocks in any order; blocks hold NaN from earlier owners."""
    rng = np.random.default_rng(11)
    p = attention_program(rng, 400, heads=6, kv_heads=2, dim=32, window=window)
    ids = [rng.integers(0, 400, n).tolist() for n in (130, 77, 300, 16)]
    needed = [-(-len(i) // block_size) for i in ids]
    order = rng.permutation(sum(needed))
    tables = np.split(order, np.cumsum(needed)[:-1])
    steps = [
        [(0, 0, 100), (1, 0, 60), (2, 0, 256)],
        [(0, 100, 101), (1, 60, 77), (2, 256, 299), (3, 0, 15)],
        [(0, 101, 102), (3, 15, 16), (2, 299, 300)],
    ]
    results = []
    for backend in (CpuBackend(threads=3, isa=isa), ReferenceBackend()):
        executable = backend.load(
            p.program("o"), p, KvCacheSpec(int(order.size), block_size, "float16"), StepLimits(512, 4, 320)
        )
        outputs = []
        for step in steps:
            parts = [(ids[s][a:b], a) for s, a, b in step]
            batch = ragged(parts, block_size=block_size, tables=[tables[s] for s, _, _ in step], outputs=[])
            outputs.append(executable.execute(batch)["o"].copy())
        results.append(np.concatenate(outputs))
        executable.close()
    np.testing.assert_allclose(results[0], results[1], atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_stale_slots_never_leak(isa):
    """A block that held huge and broken values before gives the same bits as a fresh one."""
    rng = np.random.default_rng(13)
    p = attention_program(rng, 64, heads=4, kv_heads=2, dim=32)
    for name in ("k", "v"):
        table = p.tensors[f"{name}.table"].data.view(np.float32).reshape(64, -1)
        table[40:] = np.nan
        table[50:] = np.inf
    backend = CpuBackend(threads=1, isa=isa)
    for kv in CACHE_TYPES:
        executable = backend.load(p.program("o"), p, KvCacheSpec(4, 16, kv), StepLimits(64, 2, 64))
        fresh = executable.execute(ragged([(range(20), 0)], outputs=[]))["o"].copy()
        executable.execute(ragged([(range(64), 0)], outputs=[]))
        executable.execute(ragged([(range(40, 60), 0)], tables=[[0, 1]], outputs=[]))
        again = executable.execute(ragged([(range(20), 0)], outputs=[]))["o"].copy()
        assert np.array_equal(fresh, again)
        executable.close()


@pytest.mark.parametrize("isa", ISAS)
def test_values_beyond_the_cache_type_are_stored_as_its_largest(isa):
    p = attention_program(np.random.default_rng(1), 3, heads=1, kv_heads=1, dim=16)
    values = p.tensors["v.table"].data.view(np.float32).reshape(3, 16)
    values[:] = [[1e6], [-1e6], [65503.0]]
    p.tensors["k.table"].data.view(np.float32)[:] = 0
    got = p.run(CpuBackend(threads=1, isa=isa), "o", kv="float16")
    np.testing.assert_allclose(got[0], 65504.0)
    np.testing.assert_allclose(got[1], 0.0, atol=0.1)
