"""The forms that matrices of linears may have on the card, and what they take. Known without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kvarn.errors import ConfigError

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Types that activations are computed in, and dense weights are held in."""
FormName = Literal["dense", "int8", "int4", "fp8"]
FORMS: tuple[FormName, ...] = ("dense", "int8", "int4", "fp8")
GROUPS = (32, 64, 128)
"""Weights of int4 that share a scale."""


@dataclass(frozen=True, slots=True)
class WeightForm:
    """dense: the type that is computed in. int8, fp8 (E4M3): a scale for each row. int4: scales for groups of a row.

    Raises ConfigError.
    """

    name: FormName
    group: int = 32

    def __post_init__(self) -> None:
        if self.name not in FORMS:
            raise ConfigError(f"weights must be one of {', '.join(FORMS)}, not {self.name!r}")
        if self.group not in GROUPS:
            raise ConfigError(f"weight_group must be one of {', '.join(map(str, GROUPS))}, not {self.group}")


def matrix_bytes(form: WeightForm, rows: int, columns: int, dtype: str, rounded: Callable[[int], int]) -> int:
    """Bytes of a matrix's tensors, each of them rounded up by the allocator's rule."""
    match form.name:
        case "dense":
            return rounded(rows * columns * DTYPE_BYTES[dtype])
        case "int8" | "fp8":
            return rounded(rows * columns) + rounded(4 * rows)
        case "int4":
            groups = rows * (columns // form.group)
            return rounded(rows * columns // 2) + 2 * rounded(2 * groups)
