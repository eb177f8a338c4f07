"""Every stored type's values are exactly those of the `gguf` package, over random bytes and over slices."""

import numpy as np
import pytest

from kvarn.tensors import DType, Tensor
from kvarn.tensors.dequantize import dequantize

gguf = pytest.importorskip("gguf")


def random_tensor(dtype: DType, rows: int, seed: int) -> Tensor:
    width = max(512, dtype.block_size)
    data = np.random.default_rng(seed).integers(0, 256, rows * dtype.row_bytes(width), dtype=np.uint8)
    return Tensor(dtype, (rows, width), data)


@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.name)
def test_equal_to_the_gguf_package(dtype):
    tensor = random_tensor(dtype, 64, seed=1)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[dtype.name]).reshape(tensor.shape)
    got = dequantize(tensor)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.signbit(got[finite]), np.signbit(expected[finite]))


@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.name)
def test_a_slice_of_rows_is_the_slice_of_the_values(dtype):
    tensor = random_tensor(dtype, 9, seed=2)
    np.testing.assert_array_equal(dequantize(tensor.row_slice(3, 5)), dequantize(tensor)[3:5])


def test_a_wrong_size_is_refused():
    with pytest.raises(ValueError, match="takes 64 bytes"):
        Tensor(DType.F32, (4, 4), np.zeros(63, dtype=np.uint8))
    with pytest.raises(ValueError, match="no multiple"):
        DType.Q4_K.row_bytes(128)
