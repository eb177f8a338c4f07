"""Promise 1 on the CPU: a sequence's logits are the same bits whoever shares the batch, however it was cut, however
many threads run it."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_programs import BLOCK, groups_of, ragged

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend, CpuExecutable, available_isas
from kvarn.models.in_memory import InMemoryModel
from kvarn.tensors import DType
from kvarn.testing.models import tiny_model

ISAS = available_isas()
FAST = [isa for isa in ISAS if isa != "scalar"] or ISAS
MAX_LEN = 640
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "max_position_embeddings": MAX_LEN}
CASES = {
    "llama": ("llama", WIDE, DType.Q4_1),
    "llama-k-quants": ("llama", WIDE, DType.Q4_K),
    "llama-floats": ("llama", {"max_position_embeddings": MAX_LEN}, DType.BF16),
    "qwen3": ("qwen3", WIDE, DType.Q6_K),
    "gemma3": ("gemma3_text", {**WIDE, "sliding_window": 70}, DType.Q8_0),
    "gpt2": ("gpt2", {"n_positions": MAX_LEN}, DType.Q5_0),
}


@functools.cache
def model(case: str) -> InMemoryModel:
    family, changes, dtype = CASES[case]
    return tiny_model(family, dtype=dtype, **changes)


@functools.cache
def executable(case: str, isa: str, threads: int) -> CpuExecutable:
    tiny = model(case)
    blocks = 66 * -(-MAX_LEN // BLOCK) * groups_of(tiny)
    limits = StepLimits(MAX_LEN, MAX_LEN, MAX_LEN)
    return CpuBackend(threads, isa).load(tiny.program, tiny, KvCacheSpec(blocks, BLOCK, "float16"), limits)


@functools.cache
def prompt(case: str, seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, model(case).config.vocab_size, length).tolist())


@functools.cache
def alone(case: str, isa: str, seed: int, length: int) -> np.ndarray:
    """Logits of every position: one sequence, one step, one thread."""
    ids = prompt(case, seed, length)
    return executable(case, isa, 1).execute(ragged([(ids, 0)], num_groups=groups_of(model(case))))["logits"].copy()


def crowded(case: str, isa: str, threads: int, sequences: list[tuple[int, int]], rng) -> list[np.ndarray]:
    """Logits of every position of all sequences (seed, length), computed together in chunks drawn from rng."""
    run = executable(case, isa, threads)
    prompts = [prompt(case, seed, length) for seed, length in sequences]
    per = -(-MAX_LEN // BLOCK)
    order = rng.permutation(len(sequences) * per).reshape(len(sequences), per)
    done = [0] * len(prompts)
    rows: list[list[np.ndarray]] = [[] for _ in prompts]
    while pending := [i for i, ids in enumerate(prompts) if done[i] < len(ids)]:
        chosen = rng.permutation(pending)[: rng.integers(1, len(pending) + 1)]
        room = MAX_LEN
        parts, members, counts = [], [], []
        for i in chosen:
            left = min(len(prompts[i]) - done[i], room - (len(chosen) - len(parts) - 1))
            count = int(rng.choice([1, 1, min(left, 2), min(left, 17), rng.integers(1, left + 1)]))
            parts.append((prompts[i][done[i] : done[i] + count], done[i]))
            members.append(i)
            counts.append(count)
            room -= count
        batch = ragged(parts, tables=[order[i].tolist() for i in members], num_groups=groups_of(model(case)))
        logits = run.execute(batch)["logits"]
        for i, part in zip(members, np.split(logits, np.cumsum(counts)[:-1]), strict=True):
            rows[i].append(part.copy())
            done[i] += len(part)
    return [np.concatenate(parts) for parts in rows]


def assert_same_bits(got: np.ndarray, wanted: np.ndarray) -> None:
    assert np.array_equal(got.view(np.int32), wanted.view(np.int32))


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("case", CASES)
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_crowd_chunks_and_threads_change_no_bit(case, isa, lengths, threads, seed):
    sequences = list(enumerate(lengths))
    results = crowded(case, isa, threads, sequences, np.random.default_rng(seed))
    for (number, length), got in zip(sequences, results, strict=True):
        assert_same_bits(got, alone(case, isa, number, length))


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_the_scalar_kernels_keep_the_promise_too(case):
    sequences = [(0, 40), (1, 3), (2, 21)]
    for got, (seed, length) in zip(
        crowded(case, "scalar", 2, sequences, np.random.default_rng(0)), sequences, strict=True
    ):
        assert_same_bits(got, alone(case, "scalar", seed, length))


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("case", ["llama", "llama-k-quants", "gemma3", "llama-floats"])
def test_every_batch_size_gives_the_same_bits(case, isa):
    """The same sequence alone and 2 … 64 times side by side; every copy equals the one alone."""
    wanted = alone(case, isa, 0, 5)
    for copies in (*range(2, 20), 24, 31, 32, 33, 64):
        for got in crowded_copies(case, isa, copies):
            assert_same_bits(got, wanted)


def crowded_copies(case: str, isa: str, copies: int) -> list[np.ndarray]:
    """A prefill of 4 tokens, then a decode step, of `copies` equal sequences."""
    run = executable(case, isa, 2)
    ids = prompt(case, 0, 5)
    how = {"tables": [[i] for i in range(copies)], "num_groups": groups_of(model(case))}
    first = run.execute(ragged([(ids[:4], 0)] * copies, **how))["logits"].copy()
    last = run.execute(ragged([(ids[4:], 4)] * copies, **how))["logits"].copy()
    return [np.concatenate([first[4 * i : 4 * i + 4], last[i : i + 1]]) for i in range(copies)]


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_long_decodes_cut_over_threads_equal_prefill(isa, threads):
    """Steps of one token at contexts of several key spans, one sequence alone: contexts are cut over threads."""
    ids = prompt("llama", 9, 620)
    wanted = alone("llama", isa, 9, 620)
    run = executable("llama", isa, threads)
    run.execute(ragged([(ids[:600], 0)], outputs=[]))
    for i in range(600, 620):
        assert_same_bits(run.execute(ragged([(ids[i : i + 1], i)]))["logits"], wanted[i : i + 1])


def test_instruction_sets_agree_up_to_rounding():
    results = [alone("llama-floats", isa, 3, 30) for isa in ISAS]
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=1e-4, rtol=1e-4)
