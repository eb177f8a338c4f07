"""Linears on the CPU back-end: every stored type, every instruction set, shapes that fill no panel."""

from __future__ import annotations

import numpy as np
import pytest
from op_programs import OpProgram, quantized_activations, ragged

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend, available_isas
from kvarn.program import Activation, Add, GatedActivation, Linear, Logits, Norm, Rows, SelectRows
from kvarn.tensors import DType, Tensor
from kvarn.tensors.dequantize import dequantize
from kvarn.testing.models import random_tensor

ISAS = available_isas()
QUANTIZED = [dtype for dtype in DType if dtype.quantized]
FLOATS = [DType.F32, DType.F16, DType.BF16]


def exact(x: np.ndarray, weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64 as the kernel defines it, and how far float32 rounding may take it."""
    w = dequantize(weight).astype(np.float64)
    x = quantized_activations(x) if weight.dtype.quantized else x.astype(np.float64)
    return x @ w.T, np.abs(x) @ np.abs(w).T


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", QUANTIZED + FLOATS, ids=lambda d: d.name)
def test_products_are_those_of_the_stored_weights(isa, dtype):
    rng = np.random.default_rng(7)
    step = dtype.block_size if dtype.quantized else 1
    shapes = [(1, 1), (5, 3), (16, 1), (17, 2), (100, 5)] if step > 1 else [(1, 1), (16, 33), (100, 7), (33, 100)]
    for (rows, blocks), tokens in zip(shapes, (1, 2, 8, 9, 19), strict=False):
        cols = blocks * step
        weight = random_tensor(rng, dtype, (rows, cols), 0.2)
        x = rng.standard_normal((tokens, cols)).astype(np.float32)
        x[0] *= 100
        p = OpProgram(tokens)
        p.input("x", x)
        p.add(Linear(p.buffer("y", rows), "x", p.weight("w", weight)))
        got = p.run(CpuBackend(threads=2, isa=isa), "y")
        wanted, size = exact(x, weight)
        assert np.all(np.abs(got - wanted) <= 2e-6 * size + 1e-30), (rows, cols, tokens)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", QUANTIZED, ids=lambda d: d.name)
def test_extreme_quants_do_not_saturate(isa, dtype):
    """All bits set, activations at the ends of int8: the largest sums of every format."""
    blocks = random_tensor(np.random.default_rng(1), dtype, (16, 512), 1.0).data.reshape(-1, dtype.block_bytes)
    scales = _half_bytes(dtype)
    for fill in (0x00, 0x80, 0x7F, 0xFF):
        filled = np.full_like(blocks, fill)
        filled[:, scales] = blocks[:, scales]
        weight = Tensor(dtype, (16, 512), filled.reshape(-1))
        for sign in (1.0, -1.0):
            x = np.full((3, 512), sign, np.float32)
            x[1, ::2] *= -1
            p = OpProgram(3)
            p.input("x", x)
            p.add(Linear(p.buffer("y", 16), "x", p.weight("w", weight)))
            wanted, size = exact(x, weight)
            got = p.run(CpuBackend(threads=1, isa=isa), "y")
            assert np.all(np.abs(got - wanted) <= 2e-6 * size + 1e-30), (fill, sign)


def _half_bytes(dtype: DType) -> list[int]:
    """Where a block of the type has its fp16 fields."""
    starts = {
        DType.Q2_K: (80, 82), DType.Q3_K: (108,), DType.Q4_K: (0, 2), DType.Q5_K: (0, 2), DType.Q6_K: (208,),
        DType.Q4_1: (0, 2), DType.Q5_1: (0, 2),
    }.get(dtype, (0,))  # fmt: skip
    return [start + i for start in starts for i in range(2)]


@pytest.mark.parametrize("isa", ISAS)
def test_what_follows_a_linear_is_applied_in_order(isa):
    """Norm before; bias, activation, residual after; gate and up; int8 hand-over: fused as unfused."""
    rng = np.random.default_rng(3)
    tokens, width, inner = 21, 96, 160
    backend = CpuBackend(threads=2, isa=isa)
    p = OpProgram(tokens)
    p.input("x", rng.standard_normal((tokens, width)))
    shapes = {"up": (inner, width), "gate": (inner, width), "down": (width, inner), "head": (37, width)}
    for name, shape in shapes.items():
        p.weight(name, random_tensor(rng, DType.Q8_0, shape, 0.1))
    for name, size in {"norm": width, "b_gate": inner, "b_up": inner, "b_down": width, "b_head": 37}.items():
        p.weight(name, Tensor.from_array(rng.standard_normal(size).astype(np.float32)))
    for name, size in {"h": width, "g": inner, "u": inner, "d": width}.items():
        p.buffer(name, size)
    p.add(Norm("h", "x", "norm", None, 1e-5, "rms"))
    p.add(Linear("g", "h", "gate", "b_gate"))
    p.add(Linear("u", "h", "up", "b_up"))
    p.add(GatedActivation("g", "g", "u", "silu"))
    p.add(Linear("d", "g", "down", "b_down"))
    p.add(Add("x", "x", "d"))
    p.add(Linear("u", "x", "up"))
    p.add(Activation("u", "u", "gelu_tanh"))
    p.add(Linear("d", "u", "down"))
    p.add(Add("x", "d", "x"))
    p.add(SelectRows(p.buffer("last", width, Rows.OUTPUTS), "x"))
    p.add(Logits(p.buffer("logits", 37, Rows.OUTPUTS), "last", "head", 0.5, 3.0, "b_head"))
    everything = ["h", "g", "u", "d", "x", "last"]
    fused = p.run(backend, "logits")
    executable = backend.load(p.program("logits"), p, KvCacheSpec(2), StepLimits(tokens, tokens, 32))
    unfused = executable.execute(ragged([(range(tokens), 0)]), everything)
    assert np.array_equal(fused, unfused["logits"])
    w = {name: dequantize(t).astype(np.float64) for name, t in p.tensors.items()}

    def linear(rows, name):
        return quantized_activations(rows.astype(np.float32)) @ w[name].T

    x = w["x.table"]
    h = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * w["norm"]
    gate, up = linear(h, "gate") + w["b_gate"], linear(h, "up") + w["b_up"]
    x = x + linear(gate / (1 + np.exp(-gate)) * up, "down") + w["b_down"]
    u = linear(x, "up")
    x = x + linear(0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3))), "down")
    wanted = 3 * np.tanh((linear(x, "head") * 0.5 + w["b_head"]) / 3)
    # One activation that rounds to the other side shifts a result by up to a step of int8.
    assert np.median(np.abs(fused - wanted)) < 1e-4
    assert np.abs(fused - wanted).max() < 0.05
    executable.close()


@pytest.mark.parametrize("isa", ISAS)
def test_a_broken_activation_shows(isa):
    """NaN and infinity make their own row's result NaN or infinite, and leave other rows alone."""
    rng = np.random.default_rng(5)
    weight = random_tensor(rng, DType.Q4_1, (16, 64), 0.2)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    clean = x.copy()
    x[0, 5], x[2, 40] = np.nan, np.inf
    results = []
    for values in (x, clean):
        p = OpProgram(3)
        p.input("x", values)
        p.add(Linear(p.buffer("y", 16), "x", p.weight("w", weight)))
        results.append(p.run(CpuBackend(threads=1, isa=isa), "y"))
    assert not np.isfinite(results[0][[0, 2]]).any()
    assert np.array_equal(results[0][1], results[1][1])
