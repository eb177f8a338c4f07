"""Ops that treat rows by themselves: tables, norms, rotation, activations, sums, row selection."""

from __future__ import annotations

import numpy as np
import pytest
from op_programs import OpProgram, ragged

from kvarn.backends.cpu import CpuBackend, available_isas
from kvarn.backends.reference import ReferenceBackend
from kvarn.program import (
    Activation,
    Add,
    Embed,
    GatedActivation,
    Norm,
    PositionEmbed,
    Rope,
    RopeTable,
    Rows,
    SelectRows,
)
from kvarn.tensors import DType, Tensor
from kvarn.tensors.dequantize import dequantize
from kvarn.testing.models import random_tensor

ISAS = available_isas()


def both(p: OpProgram, output: str, isa: str, batch=None):
    """The output of the CPU back-end and of the reference."""
    return p.run(CpuBackend(threads=2, isa=isa), output, batch), p.run(ReferenceBackend(), output, batch)


@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.name)
def test_embedding_rows_equal_the_files_to_the_bit(dtype):
    """Packing loses nothing: rows come back as the file's dequantization has them."""
    rng = np.random.default_rng(0)
    cols = 3 * dtype.block_size if dtype.quantized else 37
    table = random_tensor(rng, dtype, (21, cols), 0.3)
    p = OpProgram(21)
    p.weight("table", table)
    p.buffer("x", cols)
    p.add(Embed("x", "table"))
    assert np.array_equal(p.run(CpuBackend(threads=2), "x"), dequantize(table))


def test_embedding_scale():
    p = OpProgram(5)
    p.weight("table", Tensor.from_array(np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)))
    p.add(Embed(p.buffer("x", 40), "table", 6.5))
    got, wanted = both(p, "x", ISAS[0])
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("isa", ISAS)
def test_learned_positions(isa):
    rng = np.random.default_rng(0)
    p = OpProgram(9)
    p.input("x", rng.standard_normal((9, 50)))
    p.weight("positions", random_tensor(rng, DType.F16, (64, 50), 1.0))
    p.add(PositionEmbed("x", "x", "positions"))
    got, wanted = both(p, "x", isa, ragged([([1, 2, 3], 40), ([4], 0), (range(5), 2)]))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("width", "groups"), [(1, 1), (16, 1), (100, 1), (576, 1), (192, 3), (120, 5)])
def test_norms(isa, kind, width, groups):
    rng = np.random.default_rng(width)
    p = OpProgram(7)
    p.input("x", rng.standard_normal((7, width)) * 3 + 1)
    span = width // groups
    p.weight("w", Tensor.from_array(rng.standard_normal(span).astype(np.float32)))
    p.weight("b", Tensor.from_array(rng.standard_normal(span).astype(np.float32)))
    p.add(Norm(p.buffer("y", width), "x", "w", "b", 1e-5, kind, groups))
    got, wanted = both(p, "y", isa)
    np.testing.assert_allclose(got, wanted, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("style", ["halves", "interleaved"])
@pytest.mark.parametrize(("head_dim", "pairs"), [(64, 32), (80, 40), (128, 16), (10, 5), (6, 1), (256, 128), (18, 9)])
def test_rotation(isa, style, head_dim, pairs):
    rng = np.random.default_rng(head_dim)
    table = RopeTable(tuple(10000.0 ** (-i / pairs) for i in range(pairs)), style, 1.2)
    p = OpProgram(6)
    p.input("x", rng.standard_normal((6, 3 * head_dim)))
    p.add(Rope(p.buffer("y", 3 * head_dim), "x", 3, head_dim, table))
    got, wanted = both(p, "y", isa, ragged([([0, 1, 2], 1000), ([3, 4, 5], 0)]))
    np.testing.assert_allclose(got, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations_over_the_whole_range(isa, function):
    x = np.concatenate([np.linspace(-30, 30, 4001), [-1e30, -200.0, -88.5, 0.0, 88.5, 200.0, 1e30, 1e-30, -1e-30]])
    p = OpProgram(10)
    p.input("x", x.reshape(10, -1))
    p.input("u", np.random.default_rng(0).standard_normal((10, 401)))
    p.add(Activation(p.buffer("y", 401), "x", function))
    p.add(GatedActivation(p.buffer("z", 401), "x", "u", function))
    with np.errstate(over="ignore"):
        for name in ("y", "z"):
            got, wanted = both(p, name, isa)
            np.testing.assert_allclose(got, wanted, atol=1e-6, rtol=2e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_sums_and_row_selection(isa):
    rng = np.random.default_rng(0)
    p = OpProgram(8)
    p.input("a", rng.standard_normal((8, 45)))
    p.input("b", rng.standard_normal((8, 45)))
    p.add(Add("a", "b", "a"))
    p.add(SelectRows(p.buffer("y", 45, Rows.OUTPUTS), "a"))
    for rows in ([], [7], [0, 3, 5]):
        got, wanted = both(p, "y", isa, ragged([(range(8), 0)], outputs=rows))
        np.testing.assert_array_equal(got, wanted)
        assert got.shape == (len(rows), 45)
