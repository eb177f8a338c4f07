"""Norms, activations, tables and rotations in Triton against the reference back-end's functions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.backends.cuda.executable import rotary_table
from kvarn.backends.cuda.kernels.activation import activation, gated_activation
from kvarn.backends.cuda.kernels.embed import embed, position_embed
from kvarn.backends.cuda.kernels.kv_write import LayerKv, kv_write
from kvarn.backends.cuda.kernels.norm import norm
from kvarn.backends.cuda.kernels.rope import Rotation, rope, rope_kv_write
from kvarn.backends.reference import functions as f
from kvarn.program import RopeTable

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
EPSILON = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""About the distance of neighbours around one."""


def rows(seed, shape, dtype, device, spare=0):
    """Random rows, that many elements apart from one another."""
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal((shape[0], shape[1] + spare)))
    return values.to(dtype).to(device)[:, : shape[1]]


def wide(tensor):
    """Its values as they are now, whatever is written into it later."""
    return tensor.float().cpu().numpy().copy()


def assert_near(got, wanted, dtype):
    np.testing.assert_allclose(wide(got), wanted, rtol=EPSILON[dtype], atol=EPSILON[dtype] * np.abs(wanted).max())


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 5),
    span=st.integers(1, 200),
    groups=st.integers(1, 3),
    layer=st.booleans(),
    biased=st.booleans(),
    residual=st.booleans(),
    in_place=st.booleans(),
    spare=st.integers(0, 3),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_norms(device, count, span, groups, layer, biased, residual, in_place, spare, dtype, seed):
    groups = 1 if residual else groups
    x = rows(seed, (count, span * groups), dtype, device, spare)
    weight, bias = (rows(seed + n, (1, span), torch.float32, device)[0] for n in (1, 2))
    other = rows(seed + 3, x.shape, dtype, device) if residual else None
    summed = torch.empty_like(other) if residual else None
    before = wide(x) if other is None else wide((x.float() + other.float()).to(dtype))
    out = x if in_place else torch.empty_like(x)
    norm(x, weight, bias if biased else None, 1e-5, out, layer=layer, groups=groups, residual=other, summed=summed)
    parts = before.reshape(count, groups, span)
    wanted = f.layer_norm(parts, wide(weight), None, 1e-5) if layer else f.rms_norm(parts, wide(weight), 1e-5)
    wanted = (wanted + wide(bias) if biased else wanted).reshape(before.shape)
    assert_near(out, wanted, dtype)
    if summed is not None:
        np.testing.assert_array_equal(wide(summed), before)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter, where sigmoid is rightly 0
@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations(device, function, gated, dtype):
    x = rows(1, (3, 1100), dtype, device, spare=5) * 4
    x[0, :4] = torch.tensor([-80.0, 80.0, 0.0, -0.0])
    up = rows(2, x.shape, dtype, device)
    wanted = f.activation(function, wide(x))
    out = torch.empty_like(x)
    if gated:
        gated_activation(function, x, up, out)
        wanted = wanted * wide(up)
    else:
        activation(function, x, out)
    assert_near(out, wanted, dtype)
    if gated:
        gated_activation(function, x, up, x)
    else:
        activation(function, x, x)
    assert torch.equal(x, out)


def test_tables_are_looked_up(device):
    table, x = rows(1, (40, 1500), torch.bfloat16, device), rows(2, (6, 1500), torch.bfloat16, device)
    ids = torch.tensor([3, 39, 0, 3, 7, 21], dtype=torch.int32, device=device)
    out = torch.empty_like(x)
    embed(ids, table, 2.5, out)
    assert_near(out, wide(table)[ids.cpu()] * 2.5, torch.bfloat16)
    position_embed(x, ids, table, out)
    assert_near(out, wide(x) + wide(table)[ids.cpu()], torch.bfloat16)


def rotation(device, pairs, style):
    frequencies = tuple(1.0 / 10000 ** (i / pairs) for i in range(pairs))
    table = RopeTable(frequencies, style, 1.1)
    return table, Rotation(rotary_table(table, 64, torch.device(device)), style == "halves")


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 4),
    heads=st.integers(1, 3),
    pairs=st.integers(1, 40),
    rest=st.integers(0, 9),
    style=st.sampled_from(["halves", "interleaved"]),
    in_place=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_rotations(device, tokens, heads, pairs, rest, style, in_place, dtype, seed):
    dim = 2 * pairs + rest
    table, turned = rotation(device, pairs, style)
    x = rows(seed, (tokens, heads * dim), dtype, device, spare=3)
    positions = torch.from_numpy(np.random.default_rng(seed).integers(0, 64, tokens).astype(np.int32))
    wanted = f.rope(wide(x).reshape(tokens, heads, dim), positions.numpy(), table).reshape(tokens, -1)
    out = x if in_place else torch.empty_like(x)
    rope(x, out, dim, positions.to(device), turned)
    assert_near(out, wanted, dtype)


@pytest.mark.parametrize(("style", "rest"), [("halves", 0), ("interleaved", 3)])
@pytest.mark.parametrize("stored", [torch.float16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_rotating_while_writing_is_rotating_and_writing(device, style, rest, stored):
    """To the bit; queries on the way, or none; a row that fills up the batch is written nowhere."""
    pairs, heads, kv_heads, tokens = 5, 4, 2, 3
    key_dim, value_dim = 2 * pairs + rest, 7
    _, turned = rotation(device, pairs, style)
    whole = rows(1, (tokens, (heads + kv_heads) * key_dim + kv_heads * value_dim), torch.bfloat16, device)
    q, k, v = whole.split([heads * key_dim, kv_heads * key_dim, kv_heads * value_dim], dim=1)
    positions = torch.tensor([3, 63, 1], dtype=torch.int32, device=device)
    slots = torch.tensor([[0, 4], [0, 9], [0, -1]], device=device)[:, 1]

    def cache():
        shapes = ((12, kv_heads, key_dim), (12, kv_heads, value_dim))
        keys, values = (torch.zeros(shape, device=device).to(stored) for shape in shapes)
        scaled = stored == torch.int8
        scales = [torch.zeros((12, kv_heads), device=device) if scaled else None for _ in range(2)]
        return LayerKv(keys, values, *scales)

    apart, alone, together = cache(), cache(), cache()
    rotated_q, rotated_k, out = torch.empty_like(q), torch.empty_like(k), torch.empty_like(q)
    rope(q, rotated_q, key_dim, positions, turned)
    rope(k, rotated_k, key_dim, positions, turned)
    kv_write(rotated_k.reshape(tokens, kv_heads, key_dim), v.reshape(tokens, kv_heads, value_dim), slots, apart)
    rope_kv_write(None, None, key_dim, k, v, alone, slots, positions, turned)
    rope_kv_write(q, out, key_dim, k, v, together, slots, positions, turned)
    assert torch.equal(out, rotated_q)
    for name in ("keys", "values", "key_scales", "value_scales"):
        wanted = getattr(apart, name)
        if wanted is not None:
            for got in (getattr(alone, name), getattr(together, name)):
                assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.count_nonzero(apart.keys.float()) > 0
