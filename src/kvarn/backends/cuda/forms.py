"""The forms that matrices have on the card, and what they take. Known without torch, before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kvarn.config import CudaConfig
from kvarn.tensors import DType

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Of an element of activations, and of dense weights."""


@dataclass(frozen=True, slots=True)
class MatrixForm:
    """What a matrix becomes (see `packing`). Matrices of equal forms can be one, row below row."""

    kind: Literal["dense", "int4", "int8", "fp8"]
    group: int | None = None
    """Elements of a row that share a scale; None: all."""
    offsets: bool = False
    """Whether each scale has an offset beside it."""
    scale_bytes: int = 4


DENSE = MatrixForm("dense")


def form_of(stored: DType, config: CudaConfig) -> MatrixForm:
    """The form that a stored matrix gets."""
    del stored, config
    return DENSE


def matrix_bytes(form: MatrixForm, rows: int, columns: int, dtype: str, rounded: Callable[[int], int]) -> int:
    """Bytes of a matrix's tensors, each of them rounded up by the allocator's rule."""
    del form
    return rounded(rows * columns * DTYPE_BYTES[dtype])
