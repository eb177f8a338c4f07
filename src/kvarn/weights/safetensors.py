"""A checked, memory-mapped view of one .safetensors file (source: the format's README: length, JSON header, bytes).

The `safetensors` package hands tensors out as arrays of a framework, which NumPy cannot do for bfloat16; this reader
hands out the raw bytes with their type.
"""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from kvarn.errors import ModelFileError, UnsupportedModelError
from kvarn.tensors import DType, Tensor
from kvarn.weights.fingerprint import FileState, Source

MAX_HEADER_BYTES = 100_000_000
_DTYPES = {"F32": DType.F32, "F16": DType.F16, "BF16": DType.BF16}


class SafetensorsFile:
    """An open file. Owns the mapping; tensors are views of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.state = FileState.of(os.fstat(file.fileno()))
                size = self.state.size
                if size < 8:
                    raise self._fail("header", f"the file has {size} bytes")
                self._mapping: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._data = memoryview(self._mapping)
        except OSError as error:
            raise self._fail("file", f"cannot be read: {error.strerror or error}") from error
        length = int.from_bytes(self._data[:8], "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise self._fail("header", f"says it has {length} bytes, the file has {size}")
        self._base = 8 + length
        try:
            header = json.loads(bytes(self._data[8 : self._base]))
        except (ValueError, RecursionError) as error:
            raise self._fail("header", "is not JSON") from error
        if not isinstance(header, dict):
            raise self._fail("header", "is not an object")
        header.pop("__metadata__", None)
        self.tensors = {name: self._check(name, entry, size) for name, entry in header.items()}

    def _fail(self, field: str, message: str) -> ModelFileError:
        return ModelFileError(message, path=str(self.path), field=field)

    def _check(self, name: str, entry: Any, size: int) -> tuple[str, tuple[int, ...], int, int]:
        """(dtype name, shape, first byte, end) of one tensor."""
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, start, end]
        except (KeyError, TypeError, ValueError) as error:
            raise self._fail(name, "needs dtype, shape and data_offsets") from error
        if not isinstance(dtype, str) or not all(
            isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers
        ):
            raise self._fail(name, "has a dtype, shape or offset of a wrong kind")
        if start > end or self._base + end > size:
            raise self._fail(name, f"lies at bytes {start} to {end}, of {size - self._base} there are")
        if dtype in _DTYPES:
            elements = 1
            for extent in shape:
                elements *= extent
            if elements * _DTYPES[dtype].block_bytes != end - start:
                raise self._fail(name, f"{end - start} bytes do not fit shape {shape} of {dtype}")
        return dtype, tuple(shape), self._base + start, self._base + end

    def info(self, name: str) -> tuple[DType, tuple[int, ...]]:
        """Type and shape. Raises UnsupportedModelError for a type that kvarn does not run."""
        dtype, shape, _, _ = self.tensors[name]
        if dtype not in _DTYPES:
            raise UnsupportedModelError(
                f"{self.path}: {name}: type {dtype} is not supported ({', '.join(_DTYPES)} are)"
            )
        return _DTYPES[dtype], shape

    def tensor(self, name: str) -> Tensor:
        """A view of the tensor's bytes."""
        dtype, shape = self.info(name)
        _, _, start, end = self.tensors[name]
        return Tensor(dtype, shape, np.frombuffer(self._data, dtype=np.uint8, count=end - start, offset=start))

    def source(self) -> Source:
        """The file, as it was opened."""
        return Source(self.path, self.state, self._data[: self._base])

    def release(self) -> None:
        """Lets the pages go that were read."""
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Gives the mapping up; it lives on while tensors refer to it."""
        self._data = memoryview(b"")
        self._mapping = None
