"""Arrays of several shapes in one allocation: where each of them starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

ALIGNMENT = 16
"""Bytes; arrays start at multiples of it."""
Array = tuple[str, tuple[int, ...], int]
"""(name, shape, bytes of an element)."""


def offsets(arrays: Iterable[Array]) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """(name, shape, bytes of an element, offset) of each array, one behind the other."""
    offset = 0
    for name, shape, size in arrays:
        yield name, shape, size, offset
        offset += _filled(shape, size)


def num_bytes(arrays: Iterable[Array]) -> int:
    """Of all arrays."""
    return sum(_filled(shape, size) for _, shape, size in arrays)


def _filled(shape: tuple[int, ...], size: int) -> int:
    return -(-prod(shape) * size // ALIGNMENT) * ALIGNMENT
