"""One stored tensor: its type, shape and bytes (a view of a mapped file: nothing is read before it is touched)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvarn.tensors.dtypes import DType


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor in stored form. Owns nothing: `data` is a view of the file's mapping or of an array.

    shape: row-major as NumPy has it, so a linear's weight is (out features, in features). Rows (the last axis) hold
    whole blocks. data: uint8[nbytes], C order. Raises ValueError where data's size does not match.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.data.size != self.nbytes:
            raise ValueError(
                f"{self.dtype.name} tensor of shape {self.shape} takes {self.nbytes} bytes, not {self.data.size}"
            )

    @property
    def rows(self) -> int:
        """Product of all axes but the last."""
        n = 1
        for extent in self.shape[:-1]:
            n *= extent
        return n

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form."""
        return self.rows * self.dtype.row_bytes(self.shape[-1])

    def row_slice(self, start: int, stop: int) -> Tensor:
        """Rows start … stop of a matrix, without a copy."""
        if len(self.shape) != 2 or not 0 <= start < stop <= self.shape[0]:
            raise ValueError(f"rows {start}…{stop} of a tensor of shape {self.shape}")
        row = self.dtype.row_bytes(self.shape[1])
        return Tensor(self.dtype, (stop - start, self.shape[1]), self.data[start * row : stop * row])

    def first(self, count: int) -> Tensor:
        """The first `count` rows of a matrix, or elements of an unquantized vector, without a copy."""
        if len(self.shape) != 1:
            return self.row_slice(0, count)
        if not 0 < count <= self.shape[0]:
            raise ValueError(f"the first {count} elements of a tensor of shape {self.shape}")
        return Tensor(self.dtype, (count,), self.data[: self.dtype.row_bytes(count)])

    @staticmethod
    def from_array(array: NDArray[np.floating]) -> Tensor:
        """An F32 (or F16, for float16 input) tensor of the array's values."""
        if array.dtype == np.float16:
            stored = np.ascontiguousarray(array)
            return Tensor(DType.F16, array.shape, stored.view(np.uint8).reshape(-1))
        single = np.ascontiguousarray(array, dtype=np.float32)
        return Tensor(DType.F32, array.shape, single.view(np.uint8).reshape(-1))


class TensorSource(Protocol):
    """Where a program's weights come from, by the program's own names. Backends read it once, at load."""

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` of the program. Raises ModelFileError where the file lacks it or its shape is wrong."""
        ...

    def release(self) -> None:
        """Lets the memory go that reading took so far. Tensors stay valid."""
        ...
