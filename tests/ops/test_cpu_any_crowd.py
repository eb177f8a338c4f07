"""Promise 1 as a property: up to 64 sequences of any lengths, prefilled in any chunks between decodes of the others, on
1 to 4 threads, give each the logits that it has alone, in one chunk, on one thread; for every instruction set of the
machine.

The models mix stored formats within a layer and have shapes that test_cpu_same_bits leaves out: three query heads to a
KV head, heads of 64, 80 and 96, sliding windows beside whole contexts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from op_programs import BLOCK, groups_of, ragged

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend, CpuExecutable, available_isas
from kvarn.models import program_from_config
from kvarn.models.in_memory import InMemoryModel
from kvarn.tensors import DType, Tensor
from kvarn.testing.models import SETTINGS, random_weight

MOST = 64
MAX_LEN = 320
STEP_TOKENS = 384
FORMATS = (DType.Q4_1, DType.Q4_K, DType.Q6_K, DType.Q8_0, DType.F16)
SHAPE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": MAX_LEN}
CASES = {
    "heads of 64 in groups of 3": (
        "llama",
        {**SHAPE, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64},
        "float16",
    ),
    "heads of 80, window and whole": (
        "gemma3_text",
        {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 80, "sliding_window": 40},
        "int8",
    ),
    "heads of 96 in 4 bits": (
        "llama",
        {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 96},
        "int4",
    ),
}


@functools.cache
def model(case: str) -> InMemoryModel:
    """Matrix after matrix takes the next format; one whose rows hold no whole blocks of it takes Q4_1."""
    family, changes, _ = CASES[case]
    config, program = program_from_config({"model_type": family, **SETTINGS[family], **changes}, "hf")
    rng = np.random.default_rng(1)
    tensors: dict[str, Tensor] = {}
    matrices = 0
    for weight in program.weights:
        dtype = DType.F32
        if len(weight.shape) > 1:
            dtype = FORMATS[matrices % len(FORMATS)]
            dtype = dtype if weight.shape[-1] % dtype.block_size == 0 else DType.Q4_1
            matrices += 1
        tensors[weight.name] = random_weight(rng, weight.name, weight.shape, dtype)
    return InMemoryModel(config, program, tensors)


@functools.cache
def executable(case: str, isa: str, threads: int) -> CpuExecutable:
    tiny = model(case)
    blocks = MOST * -(-MAX_LEN // BLOCK) * groups_of(tiny)
    limits = StepLimits(STEP_TOKENS, STEP_TOKENS, MAX_LEN)
    return CpuBackend(threads, isa).load(tiny.program, tiny, KvCacheSpec(blocks, BLOCK, CASES[case][2]), limits)


def prompt(number: int, length: int) -> list[int]:
    return np.random.default_rng(number).integers(0, 256, length).tolist()


@functools.cache
def alone(case: str, isa: str, number: int, length: int) -> np.ndarray:
    return executable(case, isa, 1).execute(
        ragged([(prompt(number, length), 0)], num_groups=groups_of(model(case)))
    )["logits"].copy()


def steps(lengths: list[int], rng: np.random.Generator) -> Iterator[list[tuple[int, int, int]]]:
    """Steps of (sequence, first position, tokens): some of the unfinished sequences, each with one token or a chunk."""
    done = [0] * len(lengths)
    while pending := [i for i, length in enumerate(lengths) if done[i] < length]:
        step = []
        room = STEP_TOKENS
        for i in rng.permutation(pending)[: rng.integers(1, len(pending) + 1)].tolist():
            most = min(lengths[i] - done[i], room)
            if most == 0:
                break
            count = 1 if rng.random() < 0.4 else int(rng.integers(1, most + 1))
            step.append((i, done[i], count))
            done[i] += count
            room -= count
        yield step


def crowd(case: str, isa: str, threads: int, lengths: list[int], seed: int) -> list[np.ndarray]:
    """Logits of all positions of sequences 0, 1, … of these lengths, computed together."""
    rng = np.random.default_rng(seed)
    run = executable(case, isa, threads)
    prompts = [prompt(i, length) for i, length in enumerate(lengths)]
    tables = rng.permutation(MOST * -(-MAX_LEN // BLOCK)).reshape(MOST, -1).tolist()
    rows: list[list[np.ndarray]] = [[] for _ in lengths]
    for step in steps(lengths, rng):
        parts = [(prompts[i][start : start + count], start) for i, start, count in step]
        batch = ragged(parts, tables=[tables[i] for i, _, _ in step], num_groups=groups_of(model(case)))
        logits = run.execute(batch)["logits"]
        ends = np.cumsum([count for _, _, count in step])
        for (i, _, _), part in zip(step, np.split(logits, ends[:-1]), strict=True):
            rows[i].append(part.copy())
    return [np.concatenate(parts) for parts in rows]


@st.composite
def crowds(draw: st.DrawFn, short: int, long: int) -> list[int]:
    """Lengths of 1 to 64 sequences: most up to `short`, at most two up to `long`."""
    count = draw(st.integers(1, MOST))
    lengths = draw(st.lists(st.integers(1, short), min_size=count, max_size=count))
    for i, length in enumerate(draw(st.lists(st.integers(1, long), max_size=min(2, count)))):
        lengths[i] = length
    return lengths


def assert_no_bit_changes(case: str, isa: str, threads: int, lengths: list[int], seed: int) -> None:
    for number, got in enumerate(crowd(case, isa, threads, lengths, seed)):
        wanted = alone(case, isa, number, lengths[number])
        assert np.array_equal(got.view(np.int32), wanted.view(np.int32)), f"sequence {number}"


THREADS = st.integers(1, 4)
SEEDS = st.integers(0, 2**32 - 1)
FULL = [300, 150, *range(1, 12), *[3] * (MOST - 13)]


@pytest.mark.parametrize("isa", [isa for isa in available_isas() if isa != "scalar"])
@pytest.mark.parametrize("case", CASES)
@settings(max_examples=10, deadline=None)
@given(lengths=crowds(short=12, long=MAX_LEN), threads=THREADS, seed=SEEDS)
@example(lengths=FULL, threads=4, seed=0)
@example(lengths=FULL, threads=3, seed=1)
def test_no_crowd_changes_a_bit(case, isa, lengths, threads, seed):
    assert_no_bit_changes(case, isa, threads, lengths, seed)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=3, deadline=None)
@given(lengths=crowds(short=3, long=80), threads=THREADS, seed=SEEDS)
def test_nor_with_the_scalar_kernels_which_are_slow(case, lengths, threads, seed):
    assert_no_bit_changes(case, "scalar", threads, lengths, seed)


def test_the_models_hold_all_formats():
    for case in CASES:
        assert {tensor.dtype for tensor in model(case).tensors.values()} == {*FORMATS, DType.F32}
