"""Trees of draft tokens: a branch row is what it would be alone, as the end of a chain of its ancestors."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from draft_trees import Parents, Stream, leaves, path_to, shapes, tree_of
from hypothesis import given, settings
from hypothesis import strategies as st
from op_programs import groups_of, ragged
from test_cpu_attention import attention_program

from kvarn.backends import Executable, InputBatch, KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend, available_isas
from kvarn.backends.null import NullBackend
from kvarn.backends.reference import ReferenceBackend
from kvarn.backends.trees import with_trees
from kvarn.kv_types import CACHE_TYPES
from kvarn.models.in_memory import InMemoryModel
from kvarn.tensors import DType
from kvarn.testing.models import tiny_model

MAX_LEN = 512
BLOCKS = 96
"""Slots for a tree's sequence and a chain's, in blocks of 16: 768 each."""
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": MAX_LEN}
CASES = {
    "llama": ("llama", {**WIDE, "num_attention_heads": 6}, DType.Q4_1),
    "qwen3": ("qwen3", WIDE, DType.F32),
    "gemma3": ("gemma3_text", {**WIDE, "sliding_window": 70, "num_key_value_heads": 1}, DType.Q8_0),
    "mistral": ("mistral", {**WIDE, "sliding_window": 19}, DType.F16),
    "gpt2": ("gpt2", {"n_positions": MAX_LEN}, DType.F16),
}


@functools.cache
def model(case: str) -> InMemoryModel:
    family, changes, dtype = CASES[case]
    return tiny_model(family, dtype=dtype, **changes)


@functools.cache
def reference(case: str, kv: str, block_size: int) -> Executable:
    spec = KvCacheSpec(BLOCKS * 16 // block_size * groups_of(model(case)), block_size, kv)
    return ReferenceBackend().load(model(case).program, model(case), spec, StepLimits(MAX_LEN, MAX_LEN, MAX_LEN))


def streams(executable: Executable, block_size: int, seed: int = 0) -> tuple[Stream, Stream]:
    """Two sequences in blocks of any order."""
    order = np.random.default_rng(seed).permutation(BLOCKS * 16 // block_size).tolist()
    half = len(order) // 2
    return Stream(executable, order[:half], block_size), Stream(executable, order[half:], block_size)


def tokens(count: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, count)]


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    """Equal up to the roundings of matrix products whose number of rows differs."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@functools.cache
def attention_reference(kv: str, block_size: int, window: int | None) -> Executable:
    """Attention alone, of 300 tokens whose queries, keys and values are given."""
    p = attention_program(np.random.default_rng(1), 300, heads=4, kv_heads=2, dim=24, window=window)
    spec = KvCacheSpec(BLOCKS * 16 // block_size, block_size, kv)
    return ReferenceBackend().load(p.program("o"), p, spec, StepLimits(MAX_LEN, MAX_LEN, MAX_LEN))


def check_reference(executable: Executable, block_size: int, known: int, fresh: int, parents: Parents) -> None:
    """One path of a tree, then what comes after it, against a chain."""
    ids, drafts, start = tokens(known, 1), tokens(len(parents), 2), max(0, known - fresh)
    stream, chain = streams(executable, block_size)
    if start:
        stream.run(ids[:start], 0)
    rows = stream.run(ids[start:], start, drafts, parents)[known - start - 1 :]
    path = path_to(parents, leaves(parents)[-1])
    wanted = chain.run([*ids, *(drafts[i] for i in path), 7, 8], 0)[known - 1 :]
    assert_close(rows[[0, *(i + 1 for i in path)]], wanted[:-2])
    stream.accept(known, path)
    assert_close(stream.run([7, 8], known + len(path)), wanted[-2:])


@settings(max_examples=60, deadline=None)
@given(
    choices=shapes(30),
    known=st.integers(1, 100),
    fresh=st.integers(1, 20),
    kv=st.sampled_from(CACHE_TYPES),
    block_size=st.sampled_from([16, 48]),
    window=st.sampled_from([None, 1, 9, 50]),
)
def test_the_reference_reads_each_path_alone(choices, known, fresh, kv, block_size, window):
    """The definition, said once more: rows of a path are those of a chain of it, and so is what comes after it."""
    executable = attention_reference(kv, block_size, window)
    check_reference(executable, block_size, known, fresh, tree_of(choices, known, kv))


@pytest.mark.parametrize("case", CASES)
def test_a_whole_model_of_the_reference_does_so_too(case):
    """Positions are rotated, or looked up, by path. float32: what rounds to another stored key would show."""
    parents = tree_of([0, 1, 5, 2, 0, 0, 3, 4, 1, 0], 45)
    check_reference(reference(case, "float32", 48), 48, 45, 3, parents)


@functools.cache
def cpu(case: str, isa: str, threads: int, kv: str, block_size: int) -> Executable:
    spec = KvCacheSpec(BLOCKS * 16 // block_size * groups_of(model(case)), block_size, kv)
    limits = StepLimits(MAX_LEN, MAX_LEN, MAX_LEN)
    return CpuBackend(threads, isa).load(model(case).program, model(case), spec, limits)


def assert_same_bits(got: np.ndarray, wanted: np.ndarray) -> None:
    assert np.array_equal(got.view(np.int32), wanted.view(np.int32))


def check_bits(executable: Executable, block_size: int, known: int, fresh: int, parents: Parents, seed: int) -> None:
    """Every path of a tree, then what comes after one of them, against chains that are computed in one step."""
    ids, drafts, start = tokens(known, seed), tokens(len(parents), seed + 1), max(0, known - fresh)
    stream, chain = streams(executable, block_size, seed)
    if start:
        stream.run(ids[:start], 0)
    rows = stream.run(ids[start:], start, drafts, parents)[known - start - 1 :]
    for leaf in leaves(parents):
        path = path_to(parents, leaf)
        wanted = chain.run([*ids, *(drafts[i] for i in path)], 0)[known - 1 :]
        assert_same_bits(rows[[0, *(i + 1 for i in path)]], wanted)
    last = leaves(parents)[seed % len(leaves(parents))]
    path = path_to(parents, last)[: 1 + seed // 7 % 40]
    wanted = chain.run([*ids, *(drafts[i] for i in path), 7, 8, 9], 0)[-3:]
    stream.accept(known, path)
    assert_same_bits(stream.run([7], known + len(path)), wanted[:1])
    assert_same_bits(stream.run([8, 9], known + len(path) + 1), wanted[1:])


@pytest.mark.parametrize("isa", [isa for isa in available_isas() if isa != "scalar"])
@pytest.mark.parametrize("case", CASES)
@settings(max_examples=60, deadline=None)
@given(
    choices=shapes(80),
    known=st.integers(1, 400),
    fresh=st.integers(1, 90),
    kv=st.sampled_from(CACHE_TYPES),
    block_size=st.sampled_from([16, 48]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 10_000),
)
def test_a_branch_has_the_bits_of_its_chain(case, isa, choices, known, fresh, kv, block_size, threads, seed):
    parents = tree_of(choices, known, kv)
    check_bits(cpu(case, isa, threads, kv, block_size), block_size, known, fresh, parents, seed)


@pytest.mark.parametrize("kv", CACHE_TYPES)
def test_the_scalar_kernels_keep_the_promise_too(kv):
    check_bits(cpu("llama", "scalar", 2, kv, 16), 16, 59, 3, tree_of([0, 0, 5, 1, 2, 3, 0, 0, 0, 9, 7], 59, kv), 3)


@pytest.mark.parametrize("known", [63, 64, 65, 255, 256, 257])
@pytest.mark.parametrize("kv", CACHE_TYPES)
def test_trees_around_the_ends_of_tiles_and_spans(known, kv):
    """Paths that end before, at and after the ends of what attention takes at once."""
    wide = [n for n in range(6) for _ in range(3)]
    deep = [0, 0, 0, *[4] * 12, 0, 0, 0]
    for choices in (wide, deep):
        parents = tree_of(choices, known, kv)
        check_bits(cpu("gemma3", available_isas()[0], 2, kv, 16), 16, known, 1, parents, known)


def test_a_path_over_several_tiles():
    """Drafts further apart than a tile of 64 keys, some of whose paths have a whole tile of their own."""
    first = [-1, *range(150)]
    second = [20, *range(151, 300)]
    executable = cpu("llama", available_isas()[0], 2, "float16", 16)
    check_bits(executable, 16, 45, 5, (*first, *second), 1)


def crowd(tables, parents: Parents, drafts: list[int]) -> InputBatch:
    """A prompt, a tree, a decode step and a tree again in one step; positions 20, 40 and 30 are known."""
    prompt, tree, decode = tokens(50, 5), [*tokens(40, 6)[39:], *drafts], tokens(31, 7)[30:]
    again = [*tokens(30, 8)[28:], *drafts]
    parts = [(prompt, 0), (tree, 39), (decode, 30), (again, 28)]
    batch = ragged(parts, tables=tables, block_size=16, num_groups=groups_of(model("gemma3")))
    return with_trees(batch, [(), parents, (), parents])


def test_trees_beside_others_change_no_bit():
    """Prompts, decodes and other trees of the step keep their bits, and so does the tree."""
    parents = tree_of([0, 1, 2, 1, 1, 4, 0, 0, 3], 40)
    drafts = tokens(len(parents), 9)
    executable = cpu("gemma3", available_isas()[0], 2, "int8", 16)
    tables = np.random.default_rng(0).permutation(BLOCKS)[:24].reshape(4, 6).tolist()
    starts = {1: tokens(40, 6)[:39], 2: tokens(31, 7)[:30], 3: tokens(30, 8)[:28]}
    for sequence, ids in starts.items():
        Stream(executable, tables[sequence], 16).run(ids, 0)
    together = executable.execute(crowd(tables, parents, drafts))["logits"].copy()
    rows = np.split(together, np.cumsum([50, 1 + len(parents), 1]))
    assert_same_bits(rows[0], Stream(executable, tables[0], 16).run(tokens(50, 5), 0))
    assert_same_bits(rows[1], Stream(executable, tables[1], 16).run(tokens(40, 6)[39:], 39, drafts, parents))
    assert_same_bits(rows[2], Stream(executable, tables[2], 16).run(tokens(31, 7)[30:], 30))
    assert_same_bits(rows[3], Stream(executable, tables[3], 16).run(tokens(30, 8)[28:], 28, drafts, parents))


def test_a_chain_is_the_batch_of_today():
    batch = ragged([(range(9), 4)], tables=[[3]])
    assert with_trees(batch, [(-1, 0, 1)]) is batch
    assert with_trees(batch, [()]) is batch
    chain = dataclasses.replace(batch, tree_parents=np.array([-1] * 6 + [5, 6, 7], np.int32))
    executable = cpu("qwen3", available_isas()[0], 2, "int4", 16)
    assert_same_bits(executable.execute(chain)["logits"].copy(), executable.execute(batch)["logits"])
    executable = reference("qwen3", "float32", 16)
    assert_close(executable.execute(chain)["logits"], executable.execute(batch)["logits"])


BACKENDS = {
    "cpu": lambda: cpu("llama", available_isas()[0], 2, "int4", 16),
    "reference": lambda: reference("llama", "int4", 16),
    "null": lambda: NullBackend().load(
        model("llama").program, model("llama"), KvCacheSpec(BLOCKS, 16, "int4"), StepLimits(MAX_LEN, MAX_LEN, MAX_LEN)
    ),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]()


def good_tree() -> InputBatch:
    """Three known tokens of 16, five drafts of which one is at position 16; a decode step beside."""
    batch = ragged([(range(8), 11), (range(1), 5)])
    return with_trees(batch, [(-1, -1, 0, 1, 2), ()])


@pytest.mark.parametrize(
    ("row", "parent", "said"),
    [
        (0, 0, "known token"),
        (3, 3, "tree_parents"),
        (3, 1, "tree_parents"),
        (4, 8, "tree_parents"),
        (4, -1, "tree_parents"),
        (4, -2, "tree_parents"),
        (4, 2**31 - 1, "tree_parents"),
        (8, 7, "tree_parents"),
        (7, 4, "positions"),
        (1, 0, "tree_parents"),
    ],
)
def test_what_is_no_tree_is_refused(backend, row, parent, said):
    batch = good_tree()
    backend.execute(batch)
    parents = batch.tree_parents.copy()
    parents[row] = parent
    with pytest.raises(ValueError, match=said):
        backend.execute(dataclasses.replace(batch, tree_parents=parents))


def test_positions_slots_and_sizes_must_fit_the_tree(backend):
    batch = good_tree()
    for field in ("positions", "slot_mapping"):
        values = getattr(batch, field).copy()
        values[6] += 1
        with pytest.raises(ValueError, match=r"position|slot"):
            backend.execute(dataclasses.replace(batch, **{field: values}))
    with pytest.raises(ValueError, match="tree_parents"):
        backend.execute(dataclasses.replace(batch, tree_parents=batch.tree_parents[:-1].copy()))


def test_an_int4_cache_has_one_draft_where_16_tokens_begin(backend):
    backend.execute(with_trees(ragged([(range(8), 11)]), [(-1, -1, 0, 1, 2)]))
    batch = ragged([(range(9), 11)])
    with pytest.raises(ValueError, match="int4"):
        backend.execute(with_trees(batch, [(-1, -1, 0, 1, 2, 3)]))


def test_parents_come_before_their_drafts():
    batch = ragged([(range(5), 0)])
    for parents in ((1, -1), (-1, 1), (-2, 0)):
        with pytest.raises(ValueError, match="draft"):
            with_trees(batch, [parents])
    with pytest.raises(ValueError, match="5 drafts"):
        with_trees(batch, [(-1, -1, 0, 0, 0)])


@pytest.mark.parametrize("kv", CACHE_TYPES)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_moves_are_done_as_if_all_at_once(name, kv):
    """A rotation of slots: each destination is also a source. Within 16 tokens, so that int4 references stay."""
    executable = cpu("llama", available_isas()[0], 2, kv, 16) if name == "cpu" else reference("llama", kv, 16)
    stream, _ = streams(executable, 16)
    ids = tokens(12, 3)
    stream.run(ids, 0)
    before, after = (np.zeros(executable.block_bytes, np.uint8) for _ in range(2))
    executable.read_block(stream.table[0], before)
    slots = [stream.table[0] * 16 + i for i in range(12)]
    rotated = [*slots[5:], *slots[:5]]
    executable.move_slots(list(zip(slots, rotated, strict=True)))
    executable.read_block(stream.table[0], after)
    assert not np.array_equal(before, after)
    executable.move_slots(list(zip(rotated, slots, strict=True)))
    executable.read_block(stream.table[0], after)
    assert np.array_equal(before, after)
    executable.move_slots([])


@pytest.mark.parametrize("pairs", [[(-1, 0)], [(0, -1)], [(BLOCKS * 16, 0)], [(0, BLOCKS * 16)], [(0, 2), (1, 2)]])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_moves_to_nowhere_or_of_two_to_one_are_refused(name, pairs):
    executable = BACKENDS[name]()
    stream, _ = streams(executable, 16)
    stream.run(tokens(40, 1), 0)
    before, after = (np.zeros(executable.block_bytes, np.uint8) for _ in range(2))
    executable.read_block(0, before)
    with pytest.raises(ValueError, match=r"slot|destination|source"):
        executable.move_slots([(3, 4), *pairs])
    executable.read_block(0, after)
    assert np.array_equal(before, after)
