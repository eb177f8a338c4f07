"""A checked, memory-mapped reader of GGUF files (versions 2 and 3, little-endian; source: the GGUF specification).

Nothing in the file is trusted: every count, length, offset and size is compared with the bytes that are there before it
is used, so that a damaged or hostile file ends in `ModelFileError` naming the field, never in a crash or a huge
allocation.
Long arrays (vocabularies) are walked once to find their end and decoded when first asked for.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import ModelFileError, UnsupportedModelError
from kvarn.tensors import DType, Tensor
from kvarn.weights.fingerprint import FileState, Source
from kvarn.weights.strings import LENGTH_BYTES, StringsError, decode_strings, find_strings

MAGIC = b"GGUF"
MAX_KEY_BYTES = 65_535
MAX_DIMENSIONS = 4
MAX_ARRAY_DEPTH = 4
DEFAULT_ALIGNMENT = 32
LAZY_ARRAY_LENGTH = 64

_SCALARS: dict[int, tuple[str, str]] = {
    0: ("<B", "u1"), 1: ("<b", "i1"), 2: ("<H", "<u2"), 3: ("<h", "<i2"), 4: ("<I", "<u4"), 5: ("<i", "<i4"),
    6: ("<f", "<f4"), 7: ("<B", "u1"), 10: ("<Q", "<u8"), 11: ("<q", "<i8"), 12: ("<d", "<f8"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9

TENSOR_TYPES: dict[int, DType] = {
    0: DType.F32, 1: DType.F16, 2: DType.Q4_0, 3: DType.Q4_1, 6: DType.Q5_0, 7: DType.Q5_1, 8: DType.Q8_0,
    10: DType.Q2_K, 11: DType.Q3_K, 12: DType.Q4_K, 13: DType.Q5_K, 14: DType.Q6_K, 30: DType.BF16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. shape: row-major (GGUF lists extents the other way round). offset: from the file's start."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _LazyArray:
    """An array in the file that is decoded on first access: element type, count, first byte, strings' starts, end."""

    kind: int
    count: int
    start: int
    strings: NDArray[np.int64] | None
    end: int


class _Cursor:
    """Reads values front to back, never past the end of the file."""

    def __init__(self, data: memoryview, path: str) -> None:
        self.data = data
        self.path = path
        self.position = 0

    def fail(self, field: str, message: str) -> ModelFileError:
        return ModelFileError(message, path=self.path, field=field)

    def take(self, size: int, field: str) -> int:
        """Advances by `size` bytes and returns where they start."""
        start = self.position
        if size > len(self.data) - start:
            raise self.fail(field, f"needs {size} bytes at offset {start}, the file ends at {len(self.data)}")
        self.position = start + size
        return start

    def scalar(self, kind: int, field: str) -> Any:
        """One number or boolean."""
        layout = _SCALARS[kind][0]
        start = self.take(struct.calcsize(layout), field)
        value = struct.unpack_from(layout, self.data, start)[0]
        if kind == _BOOL:
            if value > 1:
                raise self.fail(field, f"boolean with value {value}")
            return bool(value)
        return value

    def count(self, field: str) -> int:
        """A 64-bit length or count."""
        value: int = self.scalar(10, field)
        return value

    def string(self, field: str, limit: int | None = None) -> str:
        """A length-prefixed UTF-8 string of at most `limit` bytes."""
        size = self.count(field)
        if limit is not None and size > limit:
            raise self.fail(field, f"string of {size} bytes, at most {limit} are allowed")
        start = self.take(size, field)
        try:
            return str(self.data[start : start + size], "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(field, f"not UTF-8 at offset {start + error.start}") from error

    def value(self, kind: int, field: str, depth: int = 0) -> Any:
        """A value of any kind; long flat arrays come as `_LazyArray`."""
        if kind in _SCALARS:
            return self.scalar(kind, field)
        if kind == _STRING:
            return self.string(field)
        if kind != _ARRAY:
            raise self.fail(field, f"value type {kind} does not exist")
        if depth >= MAX_ARRAY_DEPTH:
            raise self.fail(field, f"arrays nested deeper than {MAX_ARRAY_DEPTH}")
        element = self.scalar(4, field)
        count = self.count(field)
        start = self.position
        if element in _SCALARS:
            self.take(count * struct.calcsize(_SCALARS[element][0]), field)
            lazy = _LazyArray(element, count, start, None, self.position)
            return lazy if count > LAZY_ARRAY_LENGTH else decode_array(self, lazy, field)
        if element == _STRING:
            lazy = _LazyArray(element, count, start, self._skip_strings(count, field), self.position)
            return lazy if count > LAZY_ARRAY_LENGTH else decode_array(self, lazy, field)
        if element != _ARRAY:
            raise self.fail(field, f"array of type {element}, which does not exist")
        if count > (len(self.data) - start) // 12:
            raise self.fail(field, f"{count} arrays cannot fit in the {len(self.data) - start} bytes left")
        return [self.value(_ARRAY, field, depth + 1) for _ in range(count)]

    def _skip_strings(self, count: int, field: str) -> NDArray[np.int64]:
        """Walks `count` strings; each takes 8 bytes at least, so an absurd count fails before the walk."""
        position, size = self.position, len(self.data)
        if count > (size - position) // LENGTH_BYTES:
            raise self.fail(field, f"{count} strings cannot fit in the {size - position} bytes left")
        try:
            starts, self.position = find_strings(self.data, position, count)
        except StringsError as error:
            raise self.fail(field, f"string {error.index} of {count} {error}") from error
        return starts


def decode_array(cursor: _Cursor, array: _LazyArray, field: str) -> list[Any]:
    """The elements of an array that `value` has walked already. Raises ModelFileError for invalid UTF-8."""
    data = cursor.data
    if array.kind != _STRING:
        numbers = np.frombuffer(data[array.start : array.end], dtype=_SCALARS[array.kind][1])
        if array.kind == _BOOL:
            if numbers.size and int(numbers.max()) > 1:
                raise cursor.fail(field, "boolean with a value above 1")
            return [bool(n) for n in numbers]
        values: list[Any] = numbers.tolist()
        return values
    assert array.strings is not None
    try:
        return decode_strings(data, array.strings, array.end)
    except StringsError as error:
        raise cursor.fail(field, f"element {error.index} {error}") from error


class Metadata(Mapping[str, Any]):
    """The file's key-value pairs. Long arrays are decoded when they are first read, and kept until `forget`."""

    def __init__(self, cursor: _Cursor, values: dict[str, Any]) -> None:
        self._cursor = cursor
        self._values = values
        self._decoded: dict[str, list[Any]] = {}

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _LazyArray):
            if key not in self._decoded:
                self._decoded[key] = decode_array(self._cursor, value, key)
            return self._decoded[key]
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def forget(self) -> None:
        """Drops long arrays that were decoded: the merges of a vocabulary take tens of megabytes."""
        self._decoded.clear()


class GGUFFile:
    """An open GGUF file. Owns the mapping; tensors are views of it, valid until `close`."""

    def __init__(self, path: Path, mapping: mmap.mmap | None, data: memoryview, state: FileState | None = None) -> None:
        self.path = path
        self._state = state
        self._mapping = mapping
        self._data = data
        cursor = _Cursor(data, str(path))
        start = cursor.take(4, "magic")
        if bytes(data[start : start + 4]) != MAGIC:
            raise cursor.fail("magic", f"not a GGUF file: it begins with {bytes(data[:4])!r}")
        self.version: int = cursor.scalar(4, "version")
        if self.version not in (2, 3):
            big = int.from_bytes(self.version.to_bytes(4, "little"), "big") in (2, 3)
            raise cursor.fail(
                "version",
                "big-endian files are not supported"
                if big
                else f"version {self.version} is not supported, 2 and 3 are",
            )
        num_tensors = cursor.count("tensor_count")
        num_values = cursor.count("metadata_kv_count")
        self.metadata = Metadata(cursor, self._read_metadata(cursor, num_values))
        self.tensors: Mapping[str, TensorInfo] = self._read_tensors(cursor, num_tensors)
        self._header_bytes = cursor.position

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Maps and checks the file's header. Raises ModelFileError, also where the file cannot be read."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                state = FileState.of(os.fstat(file.fileno()))
                size = state.size
                if size < 24:
                    raise ModelFileError(f"not a GGUF file: it has {size} bytes", path=str(path), field="magic")
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelFileError(f"cannot be read: {error.strerror or error}", path=str(path)) from error
        return cls(path, mapping, memoryview(mapping), state)

    @staticmethod
    def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
        left = len(cursor.data) - cursor.position
        if count > left // 13:
            raise cursor.fail("metadata_kv_count", f"{count} pairs cannot fit in the {left} bytes left")
        values: dict[str, Any] = {}
        for index in range(count):
            key = cursor.string(f"metadata[{index}].key", MAX_KEY_BYTES)
            if key in values:
                raise cursor.fail(key, "appears twice in the metadata")
            values[key] = cursor.value(cursor.scalar(4, key), key)
        return values

    def _read_tensors(self, cursor: _Cursor, count: int) -> dict[str, TensorInfo]:
        left = len(cursor.data) - cursor.position
        if count > left // 24:
            raise cursor.fail("tensor_count", f"{count} tensors cannot fit in the {left} bytes left")
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise cursor.fail("general.alignment", f"must be a power of two from 8 to 1048576, not {alignment!r}")
        raw = [_read_tensor_header(cursor, index) for index in range(count)]
        base = (cursor.position + alignment - 1) // alignment * alignment
        size = len(cursor.data)
        tensors: dict[str, TensorInfo] = {}
        for name, dtype, shape, offset in raw:
            if name in tensors:
                raise cursor.fail(name, "two tensors have this name")
            if offset % alignment:
                raise cursor.fail(name, f"offset {offset} is no multiple of the alignment {alignment}")
            nbytes = dtype.row_bytes(shape[-1])
            for extent in shape[:-1]:
                nbytes *= extent
            if base + offset + nbytes > size:
                raise cursor.fail(name, f"ends at byte {base + offset + nbytes}, the file at {size}: is it truncated?")
            tensors[name] = TensorInfo(name, dtype, shape, base + offset, nbytes)
        _check_overlap(cursor, tensors)
        return tensors

    def tensor(self, name: str) -> Tensor:
        """A view of the tensor's bytes. Raises ModelFileError where there is none of that name."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError("the file has no such tensor", path=str(self.path), field=name)
        data: NDArray[np.uint8] = np.frombuffer(self._data, dtype=np.uint8, count=info.nbytes, offset=info.offset)
        return Tensor(info.dtype, info.shape, data)

    def sources(self) -> list[Source]:
        """The file, as it was opened; none where the data did not come from one."""
        if self._state is None:
            return []
        return [Source(self.path, self._state, self._data[: self._header_bytes])]

    def release(self) -> None:
        """Lets the pages go that were read, and what was decoded of them. Tensors stay valid."""
        self.metadata.forget()
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Gives the mapping up; it lives on while tensors refer to it."""
        self._data = memoryview(b"")
        self._mapping = None

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_tensor_header(cursor: _Cursor, index: int) -> tuple[str, DType, tuple[int, ...], int]:
    name = cursor.string(f"tensor[{index}].name", MAX_KEY_BYTES)
    dimensions = cursor.scalar(4, name)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(name, f"has {dimensions} dimensions, 1 to {MAX_DIMENSIONS} are allowed")
    extents = [cursor.count(name) for _ in range(dimensions)]
    elements = 1
    for extent in extents:
        elements *= extent
    if elements == 0 or elements >= 1 << 50:
        raise cursor.fail(name, f"extents {extents} are out of range")
    kind = cursor.scalar(4, name)
    offset = cursor.count(name)
    if kind not in TENSOR_TYPES:
        raise UnsupportedModelError(
            f"{cursor.path}: {name}: tensor type {kind} is not supported "
            f"({', '.join(d.name for d in TENSOR_TYPES.values())} are)"
        )
    dtype = TENSOR_TYPES[kind]
    if extents[0] % dtype.block_size:
        raise cursor.fail(name, f"rows of {extents[0]} are no multiple of {dtype.name}'s block of {dtype.block_size}")
    return name, dtype, tuple(reversed(extents)), offset


def _check_overlap(cursor: _Cursor, tensors: Mapping[str, TensorInfo]) -> None:
    end, before = 0, ""
    for info in sorted(tensors.values(), key=lambda t: t.offset):
        if info.offset < end:
            raise cursor.fail(info.name, f"overlaps with {before}")
        end, before = info.offset + info.nbytes, info.name
