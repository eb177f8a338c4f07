"""Counting: windows, chunks and batches add up as the attention mask says."""

from hypothesis import given
from hypothesis import strategies as st

from kvarn.backends import InputBatch, KvCacheSpec, StepLimits
from kvarn.backends.null import NullBackend
from kvarn.kv_types import KV_TYPES
from kvarn.program.counts import StepShape, count_step, total
from kvarn.testing import tiny_model


@given(st.integers(0, 60), st.integers(1, 60), st.none() | st.integers(1, 80))
def test_attended_pairs_are_those_of_the_mask(start, count, window):
    end = start + count
    visible = sum(min(p + 1, window or p + 1) for p in range(start, end))
    assert StepShape(((count, end),), 1).attended(window) == visible
    seen = {k for p in range(start, end) for k in range(max(0, p + 1 - (window or p + 1)), p + 1)}
    assert StepShape(((count, end),), 1).context(window) == len(seen)


def test_chunks_cost_as_much_attention_as_the_whole():
    whole, parts = StepShape.prefill(50), [StepShape(((20, 20),), 0), StepShape(((30, 50),), 1)]
    for window in (None, 8):
        assert whole.attended(window) == sum(p.attended(window) for p in parts)


def test_the_null_back_end_counts_what_a_step_costs():
    model = tiny_model()
    executable = NullBackend().load(model.program, model, KvCacheSpec(8), StepLimits(64, 4, 128))
    batch = InputBatch.of_one(range(20))
    logits = executable.execute(batch)["logits"]
    assert logits.shape == (1, 259)
    assert logits.argmax() == 20
    executable.execute(batch)
    sizes = {w.name: model.tensor(w.name).nbytes for w in model.program.weights}
    once = count_step(model.program, StepShape.prefill(20), sizes.__getitem__, KV_TYPES["float16"])
    assert total(executable.counts).flops == 2 * total(once).flops
    per_token = model.program.kv_bytes_per_token(KV_TYPES["float16"])
    assert executable.counts["kv_write"].kv_write_bytes == 2 * 20 * per_token
