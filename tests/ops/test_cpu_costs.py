"""What a plan's stages must move and multiply: together what the program says, and one count for each native stage."""

from __future__ import annotations

import numpy as np
import pytest
from op_programs import BLOCK, groups_of, ragged

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.cpu import Cost, CpuBackend, stage_costs, step_cost
from kvarn.kv_types import KV_TYPES
from kvarn.program.counts import StepShape
from kvarn.tensors import DType
from kvarn.testing.models import SETTINGS, tiny_model

SHAPES = {
    "prompt": StepShape.prefill(20),
    "chunk without logits": StepShape(((16, 16),), 0),
    "one decode": StepShape.decode(1, 12),
    "three decodes": StepShape.decode(3, 12),
    "ragged": StepShape(((20, 20), (2, 7)), 2),
}
BATCHES = {
    "prompt": lambda groups: ragged([(range(20), 0)], outputs=[19], num_groups=groups),
    "chunk without logits": lambda groups: ragged([(range(16), 0)], outputs=[], num_groups=groups),
    "one decode": lambda groups: ragged([([1], 11)], outputs=[0], num_groups=groups),
    "three decodes": lambda groups: ragged([([1], 11), ([2], 11), ([3], 11)], outputs=[0, 1, 2], num_groups=groups),
    "ragged": lambda groups: ragged([(range(20), 0), ([1, 2], 5)], outputs=[19, 21], num_groups=groups),
}


MODELS = [(family, DType.F32) for family in SETTINGS] + [("llama", DType.Q4_0), ("qwen3", DType.Q8_0)]


def tiny(family, dtype):
    model = tiny_model(family, dtype=dtype)
    return model, {weight.name: model.tensor(weight.name).dtype for weight in model.program.weights}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("family", "dtype"), MODELS)
def test_stages_cost_together_what_the_programs_ops_cost(family, dtype, shape):
    model, dtypes = tiny(family, dtype)
    stages = stage_costs(model.program, shape, dtypes, KV_TYPES["float16"])
    assert sum((stage.cost for stage in stages), Cost()) == step_cost(model.program, shape, dtypes, KV_TYPES["float16"])
    assert all(stage.cost == Cost() for stage in stages if not stage.runs)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("family", "dtype"), MODELS)
def test_every_stage_is_counted_once_a_step_and_has_its_cost(family, dtype, name):
    model, dtypes = tiny(family, dtype)
    kv = KvCacheSpec(8 * groups_of(model), BLOCK)
    executable = CpuBackend(threads=2).load(model.program, model, kv, StepLimits(32, 4, 64))
    batch = BATCHES[name](groups_of(model))
    try:
        uncounted = executable.execute(batch)["logits"].copy()
        assert executable.stage_counters() == []
        executable.count_stages(True)
        for _ in range(3):
            assert np.array_equal(executable.execute(batch)["logits"], uncounted)
        counters = executable.stage_counters()
        costs = stage_costs(model.program, SHAPES[name], dtypes, KV_TYPES["float16"])
        assert [counter.label for counter in counters] == [cost.label for cost in costs]
        assert [counter.calls for counter in counters] == [3 * cost.runs for cost in costs]
        assert all((counter.span_ns > 0) == (counter.calls > 0) for counter in counters)
        assert all(counter.busy_ns <= 2 * counter.span_ns for counter in counters)
        executable.count_stages(True)
        assert {counter.calls for counter in executable.stage_counters()} == {0}
        executable.count_stages(False)
        executable.execute(batch)
        assert executable.stage_counters() == []
    finally:
        executable.close()


def test_a_step_that_skips_a_stage_leaves_its_counter_alone():
    model, _ = tiny("llama", DType.Q4_0)
    executable = CpuBackend(threads=2).load(model.program, model, KvCacheSpec(8, BLOCK), StepLimits(32, 4, 64))
    try:
        executable.count_stages(True)
        for name in ("prompt", "one decode", "one decode"):
            executable.execute(BATCHES[name](1))
        calls = [(counter.label, counter.calls) for counter in executable.stage_counters()]
        assert {times for label, times in calls if label in ("heads", "prepare")} == {0, 1}  # 0: one row of logits
        assert {times for label, times in calls if label not in ("heads", "prepare")} == {3}
    finally:
        executable.close()
