"""What an engine takes is allocated at load: work leaves nothing behind, and adds little while it lasts."""

import gc
import tracemalloc

import pytest
from tiny_engine import request, run_core, tiny_engine

LOAD = {"max_num_seqs": 8, "num_blocks": 64, "max_num_batched_tokens": 32, "max_model_len": 64}
OBJECTS_OF_A_REQUEST = 16_000
"""Bytes of Python objects that a request in flight may have: its record, sequence, detokenizer, outputs."""
BYTES_OF_A_TOKEN = 200


@pytest.fixture
def core():
    engine = tiny_engine(backend="cpu", dtype="float16", **LOAD)
    yield engine.core
    engine.core.close()


def wave(core, number, requests):
    """Requests that all differ, some of them preempted, penalized or with logprobs."""
    several = [
        request(
            f"{number}-{i}", tuple((number * 31 + i * 7 + p) % 256 for p in range(10 + i % 30)), max_tokens=20,
            temperature=1.0, seed=i, repetition_penalty=1.1 if i % 3 else 1.0, logprobs=2 if i % 4 == 0 else None,
        )
        for i in range(requests)
    ]  # fmt: skip
    outputs = run_core(core, several)
    assert len(outputs) == requests


def traced(work):
    """(bytes that are left after the work, bytes at its height), both counted from before it."""
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    work()
    _, peak = tracemalloc.get_traced_memory()
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    return after - before, peak - before


def test_nothing_is_left_after_the_work(core):
    wave(core, 0, 30)
    tracemalloc.start()
    try:
        for number in range(1, 6):
            wave(core, number, 30)  # until the prefix cache has as many nodes as there are blocks
        left, _ = traced(lambda: [wave(core, number, 30) for number in range(6, 30)])
    finally:
        tracemalloc.stop()
    # NumPy keeps small freed blocks for reuse, which come and go; one forgotten object a request would be 40 kB.
    assert left < 720 * 50, f"{left} bytes left after 720 requests"


def test_a_full_engine_takes_little_more_than_an_idle_one(core):
    wave(core, 0, 30)
    tracemalloc.start()
    try:
        _, one = traced(lambda: wave(core, 1, 1))
        _, full = traced(lambda: wave(core, 2, 30))
    finally:
        tracemalloc.stop()
    assert full < one + 30 * (OBJECTS_OF_A_REQUEST + 60 * BYTES_OF_A_TOKEN), f"{one} bytes for one, {full} for 30"


def test_the_arrays_of_a_step_are_those_of_the_load(core):
    """Nothing as large as an array of the step is allocated while steps run."""
    wave(core, 0, 30)
    tracemalloc.start()
    try:
        _, peak = traced(lambda: wave(core, 1, 30))
        wave(core, 2, 8)
        largest = max(trace.size for trace in tracemalloc.take_snapshot().traces)
    finally:
        tracemalloc.stop()
    assert largest < 64_000 and peak < 1_000_000, (largest, peak)
