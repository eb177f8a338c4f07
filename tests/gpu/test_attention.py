"""Attention over the paged cache against the reference: ragged batches, types, masks; and what no result depends on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, Step, worst_row
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.backends.cuda.kernels import attention as module
from kvarn.backends.cuda.kernels.attention_plan import (
    PARTIALS,
    SHORT_QUERIES,
    AttentionPlan,
    tiles,
    workspace_elements,
)

MIXED = [(1, 5), (18, 40), (3, 270)]
"""A decode, a prompt's chunk behind known tokens, and drafts whose keys are split."""
TREE = [-1, 0, 0, -1, 2, 3]
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
"""By what weights are rounded to before they are multiplied with values."""

CASES = {
    "float16": Case(MIXED, "float16", "float16", heads=4, kv_heads=2),
    "bfloat16": Case(MIXED, "bfloat16", "bfloat16"),
    "bfloat16 queries, float16 cache": Case([(1, 40), (18, 30)], "bfloat16", "float16"),
    "int8, float16 queries": Case([(1, 40), (18, 30)], "float16", "int8"),
    "int8, float32 queries": Case([(1, 40), (18, 30)], "float32", "int8"),
    "fp8": Case([(1, 40), (18, 30)], "bfloat16", "fp8_e4m3"),
    "seven heads of a KV head": Case([(1, 30), (19, 20)], heads=7),
    "more heads than a tile has rows": Case([(1, 30), (2, 20)], heads=20),
    "no groups": Case([(1, 30), (17, 20)], heads=3, kv_heads=3),
    "dimensions that are no powers of two": Case([(1, 30), (17, 20)], key_dim=24, value_dim=20),
    "values longer than keys": Case([(1, 30), (17, 20)], key_dim=8, value_dim=40),
    "blocks of 32": Case([(1, 50), (17, 40)], block_size=32),
    "softcap": Case([(1, 40), (18, 30)], softcap=2.0),
    "window": Case([(1, 90), (20, 120)], window=37),
    "window that splits": Case([(2, 330)], "float16", "float16", window=290),
    "window of one token": Case([(2, 33), (17, 40)], window=1),
    "tree": Case([(7, 40), (1, 9), (7, 270)], "float16", "float16", heads=4, kv_heads=2, drafts={0: TREE, 2: TREE}),
    "tree of a prompt": Case([(20, 40), (2, 20)], drafts={0: [-1, -1, 0, 1, 0]}),
    "tree, window, softcap": Case([(7, 45), (20, 90)], window=4, softcap=3.0, drafts={0: TREE, 1: TREE}),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_the_references(name, device):
    case = CASES[name]
    step = Step(case, device)
    rounded = "bfloat16" if (case.dtype, case.stored) == ("float16", "int8") else case.dtype
    assert worst_row(step.run(), step.expected()) < TOLERANCES[rounded]


@settings(max_examples=5, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 20), st.integers(0, 60)).map(lambda x: (x[0], x[0] + x[1])), min_size=1, max_size=3
    ),
    heads=st.sampled_from([(4, 2), (5, 1), (2, 2)]),
    dims=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    window=st.sampled_from([None, 3, 16, 50]),
    seed=st.integers(0, 99),
)
def test_any_ragged_batch(device, rows, heads, dims, window, seed):
    step = Step(
        Case(rows, heads=heads[0], kv_heads=heads[1], key_dim=dims[0], value_dim=dims[1], window=window), device, seed
    )
    assert worst_row(step.run(), step.expected()) < TOLERANCES["float32"]


def test_a_sequences_bits_depend_on_nothing_else_in_the_batch(device):
    case = Case(MIXED, "float16", "float16")
    step = Step(case, device)
    together = step.run()
    for sequence, (count, length) in enumerate(MIXED):
        begin = int(step.batch.query_start[sequence])
        alone = Step(case.alone(sequence), device)
        alone.kv, alone.q = step.kv, step.q[begin : begin + count]
        alone.batch = replace(alone.batch, block_tables=step.batch.block_tables[sequence : sequence + 1])
        assert torch.equal(alone.run(), together[begin : begin + count]), (count, length)


def test_a_grid_of_any_size_gives_the_same_bits(device):
    step = Step(Case([(1, 270), (5, 260)], "float16", "float16", heads=4), device)
    expected = step.run()
    for max_query, programs in ((1, 1), (SHORT_QUERIES, 40), (99, 1)):
        assert torch.equal(step.run(AttentionPlan(2, 6, max_query, programs)), expected)


def test_what_fills_up_a_bucket_is_left_alone(device):
    step = Step(Case([(1, 40), (2, 270)], "float16", "float16"), device)
    for idle in (0, 1):
        out = step.run(AttentionPlan(4, 8, 2, programs=8), extra=5, idle=idle)
        assert torch.equal(out[:3], step.run())
        assert out[3:].isnan().all()
    long = Step(Case([(18, 20), (1, 9)]), device)
    out = long.run(AttentionPlan(3, 24, 18, programs=8), extra=5)
    assert torch.equal(out[:19], long.run())
    assert out[19:].isnan().all()


def test_no_sequence_has_more_partials_than_room(device, monkeypatch):
    monkeypatch.setattr(module, "MIN_SPLIT", 32)
    for count, length in ((5, 196), (SHORT_QUERIES, 66)):
        step = Step(Case([(count, length), (count, length)], heads=1), device)
        assert worst_row(step.run(), step.expected()) < TOLERANCES["float32"]


def test_a_workspace_has_room_for_all_partials_or_is_not_needed():
    assert workspace_elements(3, 8, 64, 2048) == (3 * 8 * PARTIALS * 64, 3 * 8 * PARTIALS * 2)
    assert workspace_elements(3, 8, 64, 256) == (0, 0)


def test_splits_of_one_long_sequence_fill_a_card_and_those_of_many_do_not_flood_it():
    assert AttentionPlan(1, 1, 1).split_programs(kv_heads=8, tiles=1) * 8 >= 132
    assert AttentionPlan(256, 256, 1).split_programs(kv_heads=8, tiles=1) == 4


def test_tiles_are_whole_blocks_and_splits_whole_tiles():
    for block_dim in (16, 64, 128, 256, 512, 1024):
        for float32 in (False, True):
            cut = tiles(block_dim, float32=float32)
            assert cut.long_keys % 16 == cut.short_keys % 16 == module.MIN_SPLIT % cut.short_keys == 0


@pytest.mark.parametrize("broken", ["heads", "out", "scale"])
def test_shapes_that_do_not_fit_are_refused(broken, device):
    step = Step(Case([(1, 5)]), device)
    q, out = step.q, torch.empty((1, 2, 16), device=device)
    index = torch.zeros(2, dtype=torch.int32, device=device)
    workspace = module.AttentionWorkspace.empty(1, 2, 16, 100, device)
    with pytest.raises(ValueError, match="scale above 0" if broken == "scale" else "do not fit 1 KV heads"):
        module.attention(
            q[:, :, :8] if broken == "heads" else q, step.kv, index, index, index[None], AttentionPlan(1, 1, 1),
            workspace,
            block_size=16, scale=0.0 if broken == "scale" else 1.0, out=out[:, :, :8] if broken == "out" else out,
        )  # fmt: skip
