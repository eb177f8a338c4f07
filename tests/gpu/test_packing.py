"""Packed forms of weights: the layout back and forth, the nearest levels, and stored types without any loss."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linears import FORMS, make

from kvarn.backends.cuda.packing import (
    Dense,
    Int4,
    dequantize,
    pack_nibbles,
    put_rows,
    room_for,
    unpack_nibbles,
)
from kvarn.backends.cuda.quantize import from_stored, quantize_fp8, quantize_int4, quantize_int8
from kvarn.tensors import DType, Tensor
from kvarn.tensors.dequantize import dequantize as stored_values

QUANTIZED = [dtype for dtype in DType if dtype.quantized]


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 5), width=st.integers(1, 400), seed=st.integers(0, 2**31))
def test_nibbles_come_back(rows, width, seed):
    values = torch.randint(0, 16, (rows, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_nibbles(values)
    assert packed.shape == (rows, 16 * -(-width // 128)) and packed.dtype == torch.int32
    assert torch.equal(unpack_nibbles(packed, width), values)


def test_where_a_weight_lies():
    values = torch.zeros((1, 256), dtype=torch.uint8)
    values[0, 128 + 16 * 5 + 3] = 9
    packed = pack_nibbles(values)
    assert packed[0, 16 + 3] == 9 << 20 and (packed != 0).sum() == 1


@pytest.mark.parametrize("dtype", QUANTIZED, ids=lambda dtype: dtype.name)
def test_stored_integers_are_kept_value_for_value(dtype):
    rows, width = 7, 3 * max(dtype.block_size, 96)
    data = np.random.default_rng(5).integers(0, 256, rows * dtype.row_bytes(width), dtype=np.uint8)
    tensor = Tensor(dtype, (rows, width), data)
    with np.errstate(all="ignore"):
        weight = from_stored(tensor, torch.bfloat16, torch.device("cpu"))
        got = dequantize(weight).numpy()
    np.testing.assert_array_equal(got, stored_values(tensor))
    assert isinstance(weight, Int4) == (dtype in (DType.Q4_0, DType.Q4_1, DType.Q4_K))


def test_plain_types_are_rounded_once():
    values = np.random.default_rng(6).standard_normal((3, 5)).astype(np.float32)
    weight = from_stored(Tensor.from_array(values), torch.bfloat16, torch.device("cpu"))
    assert isinstance(weight, Dense) and torch.equal(weight.weight, torch.from_numpy(values).bfloat16())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_int4_takes_the_nearest_level(group, symmetric):
    torch.manual_seed(group)
    values = torch.randn((6, 300))
    values[1] = 0
    values[2] = 3.25
    weight = quantize_int4(values, group, symmetric=symmetric)
    step = weight.scales.float().abs().repeat_interleave(group, dim=1)[:, :300]
    errors = (dequantize(weight) - values).abs()
    # Half a step; symmetric has 7 steps on the side opposite to its extreme, and offsets are fp16.
    allowed = step * (1.01 if symmetric else 0.51) + values.abs() * 2**-10
    assert (errors <= allowed).all()
    assert (errors.mean(1) <= step.mean(1) * 0.27 + 1e-3).all()


def test_int8_and_fp8_take_the_nearest():
    torch.manual_seed(8)
    values = torch.randn((6, 77)) * torch.logspace(-4, 4, 6)[:, None]
    values[1] = 0
    eight = quantize_int8(values)
    assert eight.packed.shape == (6, 80)
    assert ((dequantize(eight) - values).abs() <= eight.scales * 0.5001).all()
    narrow = quantize_fp8(values)
    assert ((dequantize(narrow) - values).abs() <= values.abs() * 2**-4 + narrow.scales * 2**-10).all()


@pytest.mark.parametrize("form", ["dense", *FORMS])
def test_stacked_rows_are_the_rows(form):
    torch.manual_seed(9)
    parts = [make(form, rows, 160, "cpu") for rows in (3, 1, 5)]
    stacked = room_for(parts[1], 9)
    for start, part in ((3, parts[1]), (0, parts[0]), (4, parts[2])):
        put_rows(stacked, start, part)
    assert stacked.rows == 9 and stacked.nbytes == sum(part.nbytes for part in parts)
    assert torch.equal(dequantize(stacked), torch.cat([dequantize(part) for part in parts]))


@pytest.mark.parametrize(("one", "other"), [("int4-32", "int4-64"), ("int4-32", "int4-32-symmetric"), ("int8", "fp8")])
def test_rows_of_different_forms_are_not_one_weight(one, other):
    whole = room_for(make(one, 2, 128, "cpu"), 4)
    with pytest.raises(ValueError, match="one form, width, group"):
        put_rows(whole, 2, make(other, 2, 128, "cpu"))


def test_another_group_is_refused():
    with pytest.raises(ValueError, match="group must be one of 32, 64, 128, not 48"):
        quantize_int4(torch.zeros((1, 96)), 48)
