"""float32 to Q8_0: what the `gguf` package makes of it."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st

from kvarn.tensors import DType
from kvarn.tensors.dequantize import dequantize
from kvarn.tensors.quantize import quantize_q4_1, quantize_q8_0


@given(st.integers(0, 2**32), st.sampled_from([1e-6, 1e-3, 1.0, 300.0]), st.booleans())
def test_the_bytes_are_those_of_gguf(seed, scale, sparse):
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((5, 96)) * scale).astype(np.float32)
    if sparse:
        values[rng.random((5, 96)) < 0.9] = 0
        values[2] = 0
    tensor = quantize_q8_0(values)
    np.testing.assert_array_equal(
        tensor.data, quants.quantize(values, GGMLQuantizationType.Q8_0).reshape(-1).view(np.uint8)
    )
    assert (tensor.dtype, tensor.shape) == (DType.Q8_0, (5, 96))
    error = np.abs(dequantize(tensor) - values).reshape(-1, 32).max(1)
    # Half a step, and what the scale lost in float16 over 127 steps.
    largest = np.abs(values).reshape(-1, 32).max(1)
    assert (error <= largest / 127 * (0.5 + 127 * 2**-11) + 127 * 2.0**-25).all()


@given(st.integers(0, 2**32), st.sampled_from([1e-3, 1.0, 300.0]))
def test_the_nibbles_are_those_of_gguf(seed, scale):
    values = (np.random.default_rng(seed).standard_normal((5, 96)) * scale).astype(np.float32)
    values[3, 32:64] = values[3, 0]
    tensor = quantize_q4_1(values)
    np.testing.assert_array_equal(
        tensor.data, quants.quantize(values, GGMLQuantizationType.Q4_1).reshape(-1).view(np.uint8)
    )
    error = np.abs(dequantize(tensor) - values).reshape(-1, 32).max(1)
    groups = values.reshape(-1, 32)
    largest = np.abs(groups).max(1)
    assert (error <= (groups.max(1) - groups.min(1)) / 15 * 0.5 + largest * 2**-9 + 2.0**-20).all()


@pytest.mark.parametrize("quantize", [quantize_q8_0, quantize_q4_1])
def test_rows_of_no_whole_blocks_are_refused(quantize):
    with pytest.raises(ValueError, match="no multiple of 32"):
        quantize(np.zeros((2, 33), np.float32))
