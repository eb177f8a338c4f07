"""The forms that matrices have on the card, and what they take. Known without torch, before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from kvarn.config import CudaConfig
from kvarn.tensors import DType

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Of an element of activations, and of dense weights."""
INT4_CHUNK = 128
"""Elements that a row of int4 is filled up to a multiple of."""
BYTE_COLUMNS = 16
"""The same for forms of a byte."""


@dataclass(frozen=True, slots=True)
class MatrixForm:
    """What a matrix becomes (see `packing`). Matrices of equal forms may be one, row below row."""

    kind: Literal["dense", "int4", "int8", "fp8"]
    group: int | None = None
    """Elements of a row that share a scale; None: all."""
    offsets: bool = False
    """Whether each scale has an offset beside it."""
    scale_bytes: int = 4


DENSE = MatrixForm("dense")
STORED = {
    DType.Q4_0: MatrixForm("int4", 32, False, 2),
    DType.Q4_1: MatrixForm("int4", 32, True, 2),
    DType.Q4_K: MatrixForm("int4", 32, True, 4),
    DType.Q5_0: MatrixForm("int8", 32, False, 2),
    DType.Q8_0: MatrixForm("int8", 32, False, 2),
    DType.Q5_1: MatrixForm("int8", 32, True, 2),
    DType.Q5_K: MatrixForm("int8", 32, True, 4),
    DType.Q3_K: MatrixForm("int8", 16, False, 4),
    DType.Q6_K: MatrixForm("int8", 16, False, 4),
    DType.Q2_K: MatrixForm("int8", 16, True, 4),
}
"""What `quantize.from_stored` makes of the types of files, value for value."""


def form_of(stored: DType, config: CudaConfig) -> MatrixForm:
    """The form that a stored matrix gets."""
    match config.weights:
        case "stored":
            return STORED.get(stored, DENSE)
        case "int4":
            return MatrixForm("int4", config.weight_group, True, 2)
        case "int8":
            return MatrixForm("int8")
        case "fp8":
            return MatrixForm("fp8")
        case _:
            return DENSE


def matrix_bytes(form: MatrixForm, rows: int, columns: int, dtype: str, rounded: Callable[[int], int]) -> int:
    """Bytes of a matrix's tensors, each of them rounded up by the allocator's rule."""
    return sum(rounded(rows * size) for size in _row_bytes(form, columns, dtype))


def _row_bytes(form: MatrixForm, columns: int, dtype: str) -> Iterator[int]:
    """Of a row in each tensor of a matrix."""
    if form.kind == "dense":
        yield columns * DTYPE_BYTES[dtype]
        return
    multiple = INT4_CHUNK if form.kind == "int4" else BYTE_COLUMNS
    filled = -(-columns // multiple) * multiple
    yield filled // 2 if form.kind == "int4" else filled
    scaled = filled if form.kind == "int4" else columns
    scales = 1 if form.group is None else -(-scaled // form.group)
    yield from [scales * form.scale_bytes] * (2 if form.offsets else 1)
