"""Whole programs on the CPU back-end against the reference: all families, fused and op by op."""

from __future__ import annotations

import numpy as np
import pytest
from op_programs import BLOCK, groups_of, quantized_activations, ragged

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend, available_isas
from kvarn.backends.reference import ReferenceBackend
from kvarn.backends.reference.executable import ReferenceExecutable
from kvarn.program import Linear, Logits
from kvarn.tensors import DType
from kvarn.testing.models import SETTINGS, tiny_model

ISAS = available_isas()
KV = KvCacheSpec(64, BLOCK, "float32")
"""Room for two KV groups."""
LIMITS = StepLimits(200, 200, 256)
STEPS = [
    [(range(70), 0), (range(5, 9), 0)],
    [(range(70, 71), 70), (range(9, 40), 4), (range(100, 103), 0)],
    [(range(71, 72), 71), (range(40, 41), 35), (range(103, 104), 3)],
]
TABLES = [[3, 1, 7, 12, 30], [0, 5, 9], [31, 2]]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", SETTINGS)
def test_families_of_float_weights(family, isa):
    tiny = tiny_model(family, dtype=DType.F32)
    cpu = CpuBackend(2, isa).load(tiny.program, tiny, KV, LIMITS)
    reference = ReferenceBackend().load(tiny.program, tiny, KV, LIMITS)
    for parts in STEPS:
        batch = ragged(parts, tables=TABLES[: len(parts)], num_groups=groups_of(tiny))
        got, wanted = cpu.execute(batch)["logits"], reference.execute(batch)["logits"]
        np.testing.assert_allclose(got, wanted, atol=3e-5, rtol=3e-5)
    cpu.close()


class Int8Reference(ReferenceExecutable):
    """The reference with what the CPU back-end adds on purpose: inputs of quantized linears are rounded to int8."""

    def _run(self, op, batch, buffers):
        if isinstance(op, Linear | Logits) and self._source.tensor(op.weight).dtype.quantized:
            rounded = {**buffers, op.x: quantized_activations(buffers[op.x]).astype(np.float32)}
            super()._run(op, batch, rounded)
            buffers[op.out] = rounded[op.out]
        else:
            super()._run(op, batch, buffers)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.name)
def test_stored_types_with_int8_activations(dtype, isa):
    """Most rows agree to float32's rounding; the others hold an activation that rounds to another int8 step."""
    tiny = tiny_model("llama", dtype=dtype, hidden_size=256, intermediate_size=512)
    cpu = CpuBackend(2, isa).load(tiny.program, tiny, KV, LIMITS)
    reference = Int8Reference(tiny.program, tiny, KV, LIMITS)
    batch = ragged([([7 * i], 0) for i in range(32)])  # one token each: no row sees another's rounding
    got, wanted = cpu.execute(batch)["logits"], reference.execute(batch)["logits"]
    error = np.abs(got - wanted).max(axis=1) / np.sqrt(np.mean(wanted**2))
    assert np.median(error) < 1e-5
    assert error.max() < 0.2
    cpu.close()


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize("dtype", [DType.F32, DType.Q4_1])
def test_any_buffer_can_be_asked_for_and_changes_nothing(family, dtype):
    """What is fused away otherwise is materialized, and equals the reference's last value of that buffer."""
    tiny = tiny_model(family, dtype=dtype)
    cpu = CpuBackend(2).load(tiny.program, tiny, KV, LIMITS)
    reference = ReferenceBackend().load(tiny.program, tiny, KV, LIMITS)
    batch = ragged([(range(20), 0)], outputs=[3, 19], num_groups=groups_of(tiny))
    plain = cpu.execute(batch)["logits"].copy()
    names = [buffer.name for buffer in tiny.program.buffers]
    wanted = reference.execute(batch, names)
    for name in names:
        result = cpu.execute(batch, [name])
        assert np.array_equal(result["logits"], plain)
        assert result[name].shape == wanted[name].shape
        error = np.abs(result[name] - wanted[name]).max()
        assert error <= (3e-5 if dtype is DType.F32 else 0.2) * max(1.0, np.abs(wanted[name]).max()), name
    together = cpu.execute(batch, names)
    assert sorted(together) == sorted(names)
    assert np.array_equal(together["logits"], plain)
    cpu.close()
