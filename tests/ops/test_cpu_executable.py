"""The CPU executable's edges: bad batches, limits, copies, memory figures, settings, closing."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time

import numpy as np
import pytest
from op_programs import BLOCK, ragged

from kvarn.backends import InputBatch, KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend, available_isas, memory_use
from kvarn.errors import ConfigError, EngineError, UnsupportedModelError
from kvarn.program import Program
from kvarn.tensors import DType, Tensor
from kvarn.testing.models import SETTINGS, tiny_model

KV = KvCacheSpec(8, BLOCK, "float16")
LIMITS = StepLimits(32, 4, 64)


@pytest.fixture
def loaded():
    tiny = tiny_model("llama")
    executable = CpuBackend(threads=2).load(tiny.program, tiny, KV, LIMITS)
    yield executable
    executable.close()


def good() -> InputBatch:
    return ragged([(range(20), 0), ([1, 2], 5)], outputs=[19, 21])


def with_element(batch: InputBatch, field: str, index, value) -> InputBatch:
    array = getattr(batch, field).copy()
    array[index] = value
    return dataclasses.replace(batch, **{field: array})


@pytest.mark.parametrize(
    ("field", "index", "value"),
    [
        ("token_ids", 3, -1),
        ("token_ids", 3, 259),
        ("positions", 4, 7),
        ("positions", 0, -1),
        ("slot_mapping", 2, 8 * BLOCK),
        ("slot_mapping", 2, -1),
        ("slot_mapping", 2, 3),
        ("query_start", 0, 1),
        ("query_start", 1, 40),
        ("query_start", 1, 0),
        ("query_start", 2, 23),
        ("seq_lens", 0, 65),
        ("seq_lens", 0, 19),
        ("seq_lens", 1, -2),
        ("block_tables", (0, 0, 1), 8),
        ("block_tables", (1, 0, 0), -1),
        ("output_rows", 1, 22),
        ("output_rows", 0, -1),
        ("output_rows", 1, 19),
    ],
)
def test_an_index_out_of_range_is_refused_and_nothing_runs(loaded, field, index, value):
    before = loaded.execute(good())["logits"].copy()
    with pytest.raises(ValueError, match=field):
        loaded.execute(with_element(good(), field, index, value))
    assert np.array_equal(loaded.execute(good())["logits"], before)


def test_arrays_of_other_sizes_or_types_are_refused(loaded):
    batch = good()
    for field in ("positions", "slot_mapping", "query_start", "seq_lens", "block_tables"):
        short = dataclasses.replace(batch, **{field: getattr(batch, field)[:-1]})
        with pytest.raises(ValueError, match=field):
            loaded.execute(short)
    with pytest.raises(TypeError):
        loaded.execute(dataclasses.replace(batch, token_ids=batch.token_ids.astype(np.float32)))


def test_steps_beyond_the_limits_are_refused(loaded):
    for parts, outputs in (
        ([(range(33), 0)], []),
        ([([1], 0)] * 5, []),
        ([(range(20), 0)], range(5)),
        ([([1], 64)], []),
    ):
        with pytest.raises(ValueError, match=r"limit|must have 1 to"):
            loaded.execute(ragged(parts, outputs=list(outputs), tables=[[0, 1, 2, 3, 4]] * len(parts)))
    empty = np.zeros(0, np.int32)
    nothing = InputBatch(
        empty, empty, np.zeros((0, 1), np.int64), np.zeros(1, np.int32), empty, np.zeros((0, 1, 1), np.int32), empty
    )
    with pytest.raises(ValueError, match="0 tokens"):
        loaded.execute(nothing)


def test_no_output_rows_give_no_logits(loaded):
    assert loaded.execute(ragged([(range(3), 0)], outputs=[]))["logits"].shape == (0, 259)


def test_an_unknown_buffer_is_refused(loaded):
    with pytest.raises(ValueError, match="nonsense"):
        loaded.execute(good(), ["nonsense"])


def test_copied_blocks_hold_the_same_cache(loaded):
    ids = list(range(18))
    loaded.execute(ragged([(ids[:17], 0)], tables=[[0, 1]], outputs=[]))
    wanted = loaded.execute(ragged([(ids[17:], 17)], tables=[[0, 1]]))["logits"].copy()
    loaded.copy_blocks([(0, 5), (1, 6), (5, 7)])
    assert np.array_equal(loaded.execute(ragged([(ids[17:], 17)], tables=[[7, 6]]))["logits"], wanted)
    for pair in ((0, 8), (-1, 0)):
        with pytest.raises(ValueError, match="8 blocks"):
            loaded.copy_blocks([pair])


def test_a_closed_executable_says_so(loaded):
    rows = loaded.execute(good())["logits"]
    kept = rows.copy()
    loaded.close()
    loaded.close()
    assert np.array_equal(rows, kept)  # views keep their memory alive
    for call in (lambda: loaded.execute(good()), lambda: loaded.copy_blocks([(0, 1)]), loaded.info):
        with pytest.raises(EngineError, match="closed"):
            call()


def test_the_interpreter_runs_during_a_step(loaded):
    """The GIL is released: with no forced switches, another thread gets its turn only where a step gives it."""
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread.start()
        before = counted[0]
        for _ in range(20_000):
            loaded.execute(good())
            if counted[0] > before:
                break
        assert counted[0] > before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "kv"), [(DType.F32, "float16"), (DType.Q5_1, "int4")])
def test_memory_is_what_was_said_before_loading(family, threads, dtype, kv):
    spec = KvCacheSpec(8, BLOCK, kv)
    tiny = tiny_model(family, dtype=dtype)
    dtypes = {name: tensor.dtype for name, tensor in tiny.tensors.items()}
    said = memory_use(tiny.program, dtypes, spec, LIMITS, threads)
    executable = CpuBackend(threads).load(tiny.program, tiny, spec, LIMITS)
    held = executable.info()
    assert held.memory == said
    assert held.threads == threads
    assert held.memory.weights == sum(w.nbytes for w in executable._parameters.matrices.values()) + 4 * sum(
        len(v) for v in executable._parameters.vectors.values()
    )
    executable.close()


def test_the_instruction_set_can_be_forced(monkeypatch):
    for isa in available_isas():
        monkeypatch.setenv("KVARN_ISA", isa)
        assert CpuBackend().isa == isa
    monkeypatch.setenv("KVARN_ISA", "neon128")
    with pytest.raises(ConfigError, match=r"KVARN_ISA must be one of .*scalar.*neon128"):
        CpuBackend()
    assert CpuBackend(isa="scalar").isa == "scalar"
    monkeypatch.setenv("KVARN_ISA", "")
    assert CpuBackend().isa == available_isas()[0]


def test_settings_out_of_range_are_refused():
    tiny = tiny_model("gpt2")
    for threads in (-1, 1025):
        with pytest.raises(ConfigError, match="threads"):
            CpuBackend(threads)
    for kv, limits, match in (
        (KvCacheSpec(8, 24), LIMITS, "block_size"),
        (KvCacheSpec(0, 16), LIMITS, "num_blocks"),
        (KV, StepLimits(0, 1, 1), "max_num_tokens"),
        (KV, StepLimits(8, 8, 513), "max_model_len must be at most 512"),
    ):
        with pytest.raises(ConfigError, match=match):
            CpuBackend(1).load(tiny.program, tiny, kv, limits)


def test_a_weight_of_another_shape_is_refused():
    tiny = tiny_model("llama")
    tiny.tensors["norm.weight"] = Tensor.from_array(np.ones(7, np.float32))
    with pytest.raises(UnsupportedModelError, match=r"norm.weight.*\(7,\)"):
        CpuBackend(1).load(tiny.program, tiny, KV, LIMITS)


def test_programs_are_shared_between_executables():
    """Nothing is global: two executables of one program run side by side."""
    tiny = tiny_model("llama")
    program: Program = tiny.program
    first, second = (CpuBackend(2).load(program, tiny, KV, LIMITS) for _ in range(2))
    results: dict[int, np.ndarray] = {}

    def run(index: int, executable) -> None:
        for _ in range(20):
            results[index] = executable.execute(good())["logits"].copy()

    threads = [threading.Thread(target=run, args=(i, e)) for i, e in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(results[0], results[1])
    first.close()
    second.close()
