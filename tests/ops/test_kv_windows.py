"""What lies before a window is never looked at: neither the block table's entries nor what the blocks hold."""

import dataclasses

import numpy as np
import pytest
from draft_trees import tree_of
from op_programs import groups_of, ragged

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend, available_isas
from kvarn.backends.reference import ReferenceBackend
from kvarn.backends.trees import with_trees
from kvarn.kv_types import CACHE_TYPES
from kvarn.testing import tiny_model

MODEL = tiny_model("gemma3_text", sliding_window=37, num_hidden_layers=3, max_position_embeddings=1024)
"""A layer that sees all, two that see 37 tokens: more than two blocks, less than a tile of 64 keys."""
GROUPS = groups_of(MODEL)
IDS = [int(i) for i in np.random.default_rng(3).integers(0, 256, 330)]
BACKENDS = [*(CpuBackend(threads, isa) for isa in available_isas() for threads in (1, 2)), ReferenceBackend()]
GARBAGE = [-1, -(2**31), 2**31 - 1]


@pytest.fixture(params=CACHE_TYPES)
def dtype(request):
    return request.param


def steps_of(lengths):
    """(first position, tokens) of steps of these many tokens."""
    starts = np.cumsum([0, *lengths])
    return list(zip(starts[:-1].tolist(), lengths, strict=True))


def logits(backend, dtype, steps, spoil):
    """Of all positions of one sequence, in some steps. spoil: given the executable and a batch, gives the batch."""
    spec = KvCacheSpec(-(-len(IDS) // 16) * GROUPS, 16, dtype)
    executable = backend.load(MODEL.program, MODEL, spec, StepLimits(128, 128, 512))
    try:
        rows = []
        for start, count in steps:
            batch = ragged([(IDS[start : start + count], start)], num_groups=GROUPS)
            rows.append(executable.execute(spoil(executable, batch, start))["logits"].copy())
        return np.concatenate(rows)
    finally:
        executable.close()


def as_it_is(_executable, batch, _start):
    return batch


def spoiled(executable, batch, start):
    """Holes hold what is no block, and what was in them is broken."""
    tables = batch.block_tables.copy()
    for group, window in enumerate(MODEL.program.kv_groups.windows):
        holes = 0 if window is None else max(0, start - window + 1) // 16
        for index in range(holes):
            executable.write_block(int(batch.block_tables[0, group, index]), broken(executable.block_bytes))
        tables[0, group, :holes] = [GARBAGE[index % 3] for index in range(holes)]
    return dataclasses.replace(batch, block_tables=tables)


def name_of(backend):
    return backend.name if isinstance(backend, ReferenceBackend) else f"{backend.isa}-{backend.threads}"


def broken(size):
    return np.full(size, 0xFF, np.uint8)  # NaN in every float, and in the scales of int8 and int4


@pytest.mark.parametrize("backend", BACKENDS, ids=name_of)
def test_holes_and_broken_blocks_before_a_window_change_no_bit(backend, dtype):
    steps = steps_of([100, 1, 1, 33, 64, 1, 90, *[1] * 20])
    wanted = logits(backend, dtype, steps, as_it_is)
    assert np.isfinite(wanted).all()
    got = logits(backend, dtype, steps, spoiled)
    assert np.array_equal(got.view(np.int32), wanted.view(np.int32))


@pytest.mark.parametrize("backend", BACKENDS, ids=name_of)
@pytest.mark.parametrize("first", [64, 147, 200])
def test_rows_of_a_tree_see_no_more_than_a_chain_would(backend, dtype, first):
    """Five known tokens from position `first` on, and a tree some of whose paths are longer than the window."""
    parents = tree_of([0] * 45 + [3, 40, 0, 0, 44, 49, 0, 7, 0, 60, 0, 0, 12, 0, 0, 0], first + 5, dtype)
    steps = [*steps_of([60, first - 60]), (first, 5 + len(parents))]

    def with_tree(change):
        def spoil(executable, batch, start):
            return change(executable, with_trees(batch, [parents]) if start == first else batch, start)

        return spoil

    wanted = logits(backend, dtype, steps, with_tree(as_it_is))
    assert np.isfinite(wanted).all()
    got = logits(backend, dtype, steps, with_tree(spoiled))
    assert np.array_equal(got.view(np.int32), wanted.view(np.int32))


@pytest.mark.parametrize("backend", BACKENDS[-2:], ids=lambda b: b.name)
def test_an_entry_inside_the_window_must_be_a_block(backend):
    """Token 100 sees tokens from 64 on."""

    def entry(index, group, value):
        def spoil(_executable, batch, start):
            tables = batch.block_tables.copy()
            if start == 100:
                tables[0, group, index] = value
            return dataclasses.replace(batch, block_tables=tables)

        return spoil

    windowed = MODEL.program.kv_groups.windows.index(37)
    steps = steps_of([100, 1])
    logits(backend, "float16", steps, entry(3, windowed, -1))
    for index, group in ((4, windowed), (0, 0)):
        with pytest.raises(ValueError, match="block"):
            logits(backend, "float16", steps, entry(index, group, -1))


@pytest.mark.parametrize("backend", BACKENDS[-2:], ids=lambda b: b.name)
def test_a_batch_of_another_number_of_groups_is_refused(backend):
    executable = backend.load(MODEL.program, MODEL, KvCacheSpec(8, 16), StepLimits(64, 2, 64))
    with pytest.raises(ValueError, match="KV groups"):
        executable.execute(ragged([(range(5), 0)], outputs=[4]))
    executable.close()
