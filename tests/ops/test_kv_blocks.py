"""Blocks of the KV cache as bytes, out of one executable and into another."""

import numpy as np
import pytest
from op_programs import ragged

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend
from kvarn.backends.reference import ReferenceBackend
from kvarn.kv_types import CACHE_TYPES
from kvarn.testing import tiny_model

IDS = [int(i) for i in np.random.default_rng(5).integers(0, 256, 33)]
GROUPS = 2
"""Of this model: a layer with a window, and one without."""
CASES = [(backend, dtype) for backend in (CpuBackend(threads=1), ReferenceBackend()) for dtype in CACHE_TYPES]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
def load(request):
    """Executables of the same model, each with a cache of its own."""
    backend, dtype = request.param
    model, loaded = tiny_model("gemma3_text"), []

    def make():
        loaded.append(backend.load(model.program, model, KvCacheSpec(8 * GROUPS, 16, dtype), StepLimits(64, 8, 128)))
        return loaded[-1]

    yield make
    for executable in loaded:
        executable.close()


def step(executable, tokens, start, table):
    batch = ragged([(tokens, start)], tables=[table], outputs=[len(tokens) - 1], num_groups=GROUPS)
    return executable.execute(batch)["logits"].copy()


def test_blocks_that_are_carried_over_say_the_same(load):
    one, other = load(), load()
    step(one, IDS[:32], 0, [0, 1, 2])
    expected = step(one, IDS[32:], 32, [0, 1, 2])
    data = np.zeros(one.block_bytes, np.uint8)
    for block, place in ((0, 6), (1, 3)):
        for group in range(GROUPS):
            one.read_block(block * GROUPS + group, data)
            assert data.any()
            other.write_block(place * GROUPS + group, data)
    assert np.array_equal(step(other, IDS[32:], 32, [6, 3, 0]), expected)


@pytest.mark.parametrize(("block", "extra"), [(-1, 0), (8 * GROUPS, 0), (0, 1), (0, -1)])
def test_no_such_block_and_no_such_size(load, block, extra):
    executable = load()
    data = np.zeros(executable.block_bytes + extra, np.uint8)
    for call in (executable.read_block, executable.write_block):
        with pytest.raises(ValueError, match="block"):
            call(block, data)
