"""The reference back-end's arithmetic, op by op, against torch in float64 and against the definitions written out."""

import math
import warnings

import numpy as np
import pytest
from op_programs import OpProgram, ragged

from kvarn.backends.reference import ReferenceBackend
from kvarn.backends.reference import functions as f
from kvarn.program import (
    Activation,
    Add,
    Attention,
    GatedActivation,
    KvLayer,
    KvWrite,
    Linear,
    Logits,
    Norm,
    PositionEmbed,
    Rope,
    RopeTable,
    Rows,
    SelectRows,
)
from kvarn.program.ops import Embed
from kvarn.tensors import DType, Tensor
from kvarn.tensors.dequantize import dequantize
from kvarn.testing import random_tensor

torch = pytest.importorskip("torch", reason="torch is the oracle")
functional = torch.nn.functional

REFERENCE = ReferenceBackend()


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def wide(array):
    return torch.from_numpy(np.asarray(array, np.float64))


def assert_close(got, want, ulps=4):
    """Within a few roundings of float32, of each value and of the largest."""
    want = np.asarray(want, np.float64)
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(got, want, rtol=ulps * eps, atol=ulps * eps * np.abs(want).max())


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm(groups, eps):
    x, weight = normal(5, 24, scale=3), normal(24 // groups, seed=1)
    p = OpProgram(5)
    p.input("x", x)
    p.weight("w", Tensor.from_array(weight))
    p.add(Norm(p.buffer("y", 24), "x", "w", None, eps, "rms", groups))
    spans = wide(x).reshape(5, groups, -1)
    want = functional.rms_norm(spans, spans.shape[-1:], wide(weight), eps).reshape(5, 24)
    assert_close(p.run(REFERENCE, "y"), want)


@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norm(with_bias):
    x, weight, bias = normal(4, 20) + 50, normal(20, seed=1), normal(20, seed=2)
    p = OpProgram(4)
    p.input("x", x)
    p.weight("w", Tensor.from_array(weight))
    name = p.weight("b", Tensor.from_array(bias)) if with_bias else None
    p.add(Norm(p.buffer("y", 20), "x", "w", name, 1e-5, "layer"))
    want = functional.layer_norm(wide(x), (20,), wide(weight), wide(bias) if with_bias else None, 1e-5)
    assert_close(p.run(REFERENCE, "y"), want)


@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.name)
def test_linear_multiplies_the_dequantized_weight(dtype):
    x, stored, bias = normal(6, 256), random_tensor(np.random.default_rng(1), dtype, (40, 256), 0.1), normal(40, seed=2)
    p = OpProgram(6)
    p.input("x", x)
    p.weight("w", stored)
    p.weight("b", Tensor.from_array(bias))
    p.add(Linear(p.buffer("y", 40), "x", "w", "b"))
    want = wide(x) @ wide(dequantize(stored)).T + wide(bias)
    assert_close(p.run(REFERENCE, "y"), want, ulps=16)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.Q4_1, DType.Q6_K], ids=lambda d: d.name)
def test_embeddings_are_rows_of_the_table(dtype):
    p = OpProgram(9)
    table = random_tensor(np.random.default_rng(3), dtype, (9, 256), 1.0)
    p.weight("table", table)
    p.add(Embed(p.buffer("x", 256), "table", 2.5))
    got = p.run(REFERENCE, "x", ragged([([7, 0, 7, 8], 0)]))
    np.testing.assert_array_equal(got, dequantize(table)[[7, 0, 7, 8]] * np.float32(2.5))


def test_learned_positions_are_added():
    x, table = normal(8, 12), normal(16, 12, seed=1)
    p = OpProgram(8)
    p.input("x", x)
    p.weight("positions", Tensor.from_array(table))
    p.add(PositionEmbed(p.buffer("y", 12), "x", "positions"))
    got = p.run(REFERENCE, "y", ragged([([0, 1], 3), ([2], 15)]))
    np.testing.assert_array_equal(got, x[:3] + table[[3, 4, 15]])


@pytest.mark.parametrize("style", ["halves", "interleaved"])
@pytest.mark.parametrize("rotary", [8, 6])
def test_rope_turns_pairs_as_complex_numbers(style, rotary):
    """(a, b) is a + ib, multiplied by factor · exp(i · position · frequency); what is beyond rotary_dim stays."""
    x, heads, dim = normal(5, 24), 3, 8
    frequencies = tuple(10000.0 ** (-2 * i / rotary) for i in range(rotary // 2))
    table = RopeTable(frequencies, style, 1.25)
    p = OpProgram(5)
    p.input("x", x)
    p.add(Rope(p.buffer("y", 24), "x", heads, dim, table))
    got = p.run(REFERENCE, "y", ragged([(range(5), 1000)]))
    want = x.astype(np.float64).reshape(5, heads, dim).copy()
    for t in range(5):
        for i, frequency in enumerate(frequencies):
            a, b = (i, i + rotary // 2) if style == "halves" else (2 * i, 2 * i + 1)
            turned = (want[t, :, a] + 1j * want[t, :, b]) * 1.25 * np.exp(1j * (1000 + t) * frequency)
            want[t, :, a], want[t, :, b] = turned.real, turned.imag
    assert_close(got, want.reshape(5, 24))


def test_rope_keeps_the_first_token_and_relative_angles():
    table = RopeTable((1.0, 0.1, 0.01, 0.001), "halves")
    q, k = normal(1, 1, 8), normal(1, 1, 8, seed=1)

    def product(at, of):
        return float(np.sum(f.rope(q, np.array([at]), table) * f.rope(k, np.array([of]), table)))

    np.testing.assert_array_equal(f.rope(q, np.array([0]), table), q)
    assert product(7, 3) == pytest.approx(product(107, 103), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-4)


FUNCTIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
VALUES = np.concatenate([np.linspace(-12, 12, 200), [0.0, -0.0, 1e-30, -1e4, 1e4, -3e38, 3e38, -750.0]])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_activations(function):
    x = VALUES.astype(np.float32)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = OpProgram(1)
        p.input("x", x)
        p.add(Activation(p.buffer("y", x.shape[1]), "x", function))
        got = p.run(REFERENCE, "y")
    want = FUNCTIONS[function](wide(x)).numpy()
    np.testing.assert_allclose(got, want, rtol=3e-7, atol=1e-14)  # in the tails torch's own 1 + erf(x) cancels


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gated_activations(function):
    gate, up = normal(3, 40, scale=3), normal(3, 40, seed=1)
    p = OpProgram(3)
    p.input("gate", gate)
    p.input("up", up)
    p.add(GatedActivation("gate", "gate", "up", function))
    assert_close(p.run(REFERENCE, "gate"), FUNCTIONS[function](wide(gate)) * wide(up))


def test_add_and_selected_rows():
    a, b = normal(6, 8), normal(6, 8, seed=1)
    p = OpProgram(6)
    p.input("a", a)
    p.input("b", b)
    p.add(Add("a", "a", "b"))
    p.add(SelectRows(p.buffer("last", 8, Rows.OUTPUTS), "a"))
    got = p.run(REFERENCE, "last", ragged([(range(6), 0)], outputs=[1, 5]))
    np.testing.assert_array_equal(got, (a + b)[[1, 5]])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_logits(softcap):
    x, weight, bias = normal(3, 16), normal(50, 16, seed=1), normal(50, seed=2)
    p = OpProgram(3)
    p.input("x", x)
    p.weight("w", Tensor.from_array(weight))
    p.weight("b", Tensor.from_array(bias))
    p.add(Logits(p.buffer("y", 50), "x", "w", 0.5, softcap, "b"))
    want = 0.5 * wide(x) @ wide(weight).T + wide(bias)
    want = want if softcap is None else softcap * torch.tanh(want / softcap)
    assert_close(p.run(REFERENCE, "y"), want, ulps=16)


def written_out(q, k, v, position, kv_heads, scale, window, softcap):
    """Attention of one row in float64, head by head. q: (H, D); k, v: (N, KV, D) of its own sequence."""
    first = 0 if window is None else max(0, position - window + 1)
    out = []
    for h in range(len(q)):
        kv = h // (len(q) // kv_heads)
        scores = [scale * float(np.dot(q[h].astype(np.float64), k[n, kv])) for n in range(first, position + 1)]
        if softcap is not None:
            scores = [softcap * math.tanh(s / softcap) for s in scores]
        weights = [math.exp(s - max(scores)) for s in scores]
        out.append(sum(w * v[first + n, kv].astype(np.float64) for n, w in enumerate(weights)) / sum(weights))
    return np.concatenate(out)


ATTENTIONS = {
    "mha": (4, 4, None, None),
    "gqa": (6, 2, None, None),
    "mqa": (5, 1, None, None),
    "window": (4, 2, 5, None),
    "window-of-one": (4, 2, 1, None),
    "softcap": (4, 2, None, 3.0),
    "all": (6, 3, 17, 2.0),
}


def attention_program(tokens, heads, kv_heads, window, softcap, dim=8):
    width, kv_width = heads * dim, kv_heads * dim
    p = OpProgram(tokens)
    arrays = normal(tokens, width), normal(tokens, kv_width, seed=1), normal(tokens, kv_width, seed=2)
    for name, values in zip("qkv", arrays, strict=True):
        p.input(name, values)
    p.kv_layers.append(KvLayer(kv_heads, dim, dim, window))
    p.add(KvWrite(0, "k", "v"))
    p.add(Attention(0, p.buffer("out", width), "q", heads, kv_heads, dim, 0.6, window, softcap))
    q, k, v = (a.reshape(tokens, -1, dim) for a in arrays)
    return p, q, k, v


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_of_a_ragged_batch(name):
    """Tokens 0…29 are one sequence, 30…36 another; their blocks are scattered and interleaved."""
    heads, kv_heads, window, softcap = ATTENTIONS[name]
    p, q, k, v = attention_program(37, heads, kv_heads, window, softcap)
    got = p.run(REFERENCE, "out", ragged([(range(30), 0), (range(30, 37), 0)], tables=[[5, 2], [3]]))
    for row in range(37):
        start = 0 if row < 30 else 30
        want = written_out(q[row], k[start:], v[start:], row - start, kv_heads, 0.6, window, softcap)
        assert_close(got[row], want, ulps=8)


def test_attention_is_torchs():
    heads, kv_heads = 6, 2
    p, q, k, v = attention_program(20, heads, kv_heads, None, None)
    want = functional.scaled_dot_product_attention(
        *(wide(a).transpose(0, 1)[None] for a in (q, k, v)), is_causal=True, scale=0.6, enable_gqa=True
    )
    assert_close(p.run(REFERENCE, "out"), want[0].transpose(0, 1).reshape(20, -1), ulps=8)


def test_a_half_precision_cache_rounds_and_saturates():
    p, q, k, v = attention_program(12, 4, 2, None, None)
    k[3, 0, 0], v[5, 1, 2] = 1e6, -1e6
    for name, values in (("k", k), ("v", v)):
        p.weight(f"{name}.table", Tensor.from_array(values.reshape(12, -1)))
    halves = [np.clip(a, -65504, 65504).astype(np.float16).astype(np.float32) for a in (k, v)]
    got = p.run(REFERENCE, "out", kv="float16")
    for row in range(12):
        assert_close(got[row], written_out(q[row], *halves, row, 2, 0.6, None, None), ulps=8)
