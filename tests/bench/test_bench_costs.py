"""Tasks, what they cost, what the roof says to that, and how several times become one figure."""

import dataclasses

import numpy as np
import pytest

from kvarn.backends.cpu import Cost, CpuBackend
from kvarn.bench.batches import KV
from kvarn.bench.latency import make_row, read_sizes
from kvarn.bench.limits import Limit, bound
from kvarn.bench.statistics import Spread
from kvarn.bench.stepper import open_stepper
from kvarn.bench.tasks import Task, check_tasks, compare_tasks, latency_tasks
from kvarn.errors import ConfigError
from kvarn.program.counts import StepShape
from kvarn.testing.gguf import write_tiny_gguf


def test_a_spread_is_median_and_both_ends():
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)


def test_tasks_become_steps():
    assert list(Task("", "decode", 2, 3, 10).steps()) == [StepShape.decode(3, 11), StepShape.decode(3, 12)]
    long = Task("", "prefill", 600)
    assert list(long.steps()) == [StepShape(((512, 512),), 0), StepShape(((88, 600),), 1)]
    assert long.num_steps == 2
    assert Task.of(long.message()) == long


def test_the_tasks_of_the_commands():
    tasks = latency_tasks(prefill=512, decode=128, depth=4096, batches=(1, 16))
    assert [task.name for task in tasks] == ["prefill 512", "decode, batch 1", "decode, batch 16", "decode at 4096"]
    assert [task.total_tokens for task in tasks] == [512, 128, 16 * 32, 32]
    assert compare_tasks(4096) == tasks
    assert len(compare_tasks(0)) == 3


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Task("", "prefill", 300), "--prefill must be at most 256 for this model, not 300"),
        (Task("", "decode", 300), "--decode must be at most 256 for this model, not 300"),
        (Task("", "decode", 32, 1, 250), "--depth must be at most 224 for this model, not 250"),
    ],
)
def test_a_sequence_longer_than_the_model_is_refused(task, said):
    with pytest.raises(ConfigError, match=said):
        check_tasks([task], 256)


def test_the_limit_is_whichever_takes_longer(roof):
    assert bound(Cost(weight_bytes=10**9, integer_macs=10**9), roof) == (0.1, Limit.MEMORY)
    seconds, limit = bound(Cost(kv_bytes=10**8, integer_macs=10**9, float_macs=10**9), roof)
    assert (seconds, limit) == (pytest.approx(0.01 + 0.05), Limit.ARITHMETIC)


def test_a_row_is_tokens_and_shares_of_the_median(roof):
    cost = Cost(weight_bytes=10**9, integer_macs=10**9)
    row = make_row(Task("", "decode", 10, 2), [0.1, 0.4, 0.2], cost, [roof] * 3)
    assert row.tokens_per_s == Spread(100.0, 50.0, 200.0)
    assert row.step_ms == pytest.approx(20)
    assert (row.bytes_per_s, row.macs_per_s) == (5e9, 5e9)
    assert (row.share, row.limit, row.roof) == (0.5, Limit.MEMORY, roof)


def test_a_share_is_of_the_roof_of_its_time(roof):
    half = dataclasses.replace(roof, read_bytes=5e9)
    cost = Cost(weight_bytes=10**9, integer_macs=10**9)
    row = make_row(Task("", "decode", 10), [0.125, 0.25, 0.25], cost, [roof, half, half])
    assert (row.share, row.roof) == (0.8, half)


def test_a_decode_step_reads_every_weight_once_and_one_row_of_the_table(tmp_path):
    model = write_tiny_gguf(tmp_path / "tiny.gguf", vocab_size=320)  # whole panels: nothing is padded
    sizes = read_sizes(model)
    with open_stepper(model, CpuBackend(threads=1), [Task("", "decode", 1)]) as stepper:
        held = stepper.executable.info().memory.weights
    cost = sizes.cost(Task("", "decode", 1))
    embed = next(op for op in sizes.program.ops if op.kind == "embed")
    table = sizes.program.weight(embed.weight)
    matrices = [op.weight for op in sizes.program.ops if op.kind in ("linear", "logits")]
    row = 4 * table.shape[1]
    read_once = held if embed.weight in matrices else held - 4 * table.num_elements
    assert cost.weight_bytes == read_once + row
    cached = sizes.program.kv_bytes_per_token(KV)
    assert cost.kv_bytes == 2 * cached
    linear = sum(sizes.program.weight(name).num_elements for name in matrices)
    attention = cost.macs - linear
    assert 0 < attention < linear


def test_contexts_at_depth_outlast_other_tasks(model):
    deep, wide, prompt = Task("", "decode", 2, 1, 40), Task("", "decode", 3, 4), Task("", "prefill", 48)
    with open_stepper(model, CpuBackend(threads=2), [deep, wide, prompt]) as stepper:

        def logits():
            stepper.prepare(deep)
            return stepper.executable.execute(next(stepper.batches(deep)))["logits"].copy()

        first = logits()
        for task in (prompt, wide, deep):
            assert stepper.seconds(task) > 0
        assert np.array_equal(logits(), first)
    with open_stepper(model, CpuBackend(threads=1), [deep]) as fresh:
        fresh.prepare(deep)
        assert np.array_equal(fresh.executable.execute(next(fresh.batches(deep)))["logits"], first)


def test_sequences_of_a_batch_do_not_share_slots(model):
    task = Task("", "decode", 3, 4, 20)
    with open_stepper(model, CpuBackend(threads=1), [task]) as stepper:
        for batch in stepper.batches(task):
            assert len(set(batch.slot_mapping.ravel().tolist())) == 4
            assert len(set(batch.block_tables.reshape(-1).tolist())) == batch.block_tables.size
        assert stepper.seconds(task) > 0
