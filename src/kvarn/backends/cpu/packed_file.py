"""Packed weights in a file: written once, mapped by every later start.

    magic, layout, bytes of the header    "<8sII"
    sha256 of the header
    header, JSON                          key, and of each weight name, stored type, shape, offset, bytes
    weights                               each at a multiple of 4096 bytes; 4096 zero bytes behind the last

Matrices are panels as `kvarn/formats.h` has them, vectors float32. Nothing in a file is believed: it must be of the
key that is asked for, hold the program's weights and no others, and have each where this module would put it. Then
every offset and size follows from types and shapes, and the native mapping compares them with the file once more.
Values of weights are not checked: reading them would take what the file saves, and no value makes kernels leave their
memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvarn import _native
from kvarn.program import Program
from kvarn.tensors import DType

MAGIC = b"kvarnPW\n"
PREFIX = struct.Struct("<8sII")
DIGEST_BYTES = 32
PAGE = 4096
MAX_HEADER_BYTES = 16 << 20
CHUNK_BYTES = 8 << 20


class StaleFileError(Exception):
    """Of another model, or of the same one before it changed: nothing is wrong, and nothing can be used."""


class DamagedFileError(Exception):
    """Not what this module writes."""


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """What programs' weights become. dtypes: the stored type of each."""

    matrices: Mapping[str, _native.PackedWeight]
    vectors: Mapping[str, _native.Vector]
    dtypes: Mapping[str, DType]


@dataclass(frozen=True, slots=True)
class _Place:
    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        rows = 1
        for extent in self.shape[:-1]:
            rows *= extent
        return rows

    def entry(self) -> list[Any]:
        """The place as the header has it."""
        return [self.name, self.dtype.name, list(self.shape), self.offset, self.nbytes]


def file_bytes(program: Program, dtypes: Mapping[str, DType]) -> int:
    """Bytes of the file, but for its header's, which are few."""
    return _end(_places(program, dtypes, 0))


def read_packed(path: Path, key: str, program: Program) -> PackedWeights:
    """Maps a file. Raises FileNotFoundError, StaleFileError, DamagedFileError, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_uid not in (os.geteuid(), 0):
            raise DamagedFileError("belongs to another user")
        header = _read_header(fd)
        if header.get("key") != key:
            raise StaleFileError("of another content")
        file = _native.MappedFile(fd)
        places = _checked(header, program, file.nbytes)
        weights = PackedWeights(
            {p.name: _native.mapped_weight(p.dtype.name, p.rows, p.shape[-1], file, p.offset)
             for p in places if len(p.shape) > 1},
            {p.name: _vector(fd, p) for p in places if len(p.shape) == 1},
            {p.name: p.dtype for p in places},
        )  # fmt: skip
        with suppress(OSError):  # says when it was last used; a cache that cannot be written is still read
            os.utime(fd)
        return weights
    except ValueError as error:
        raise DamagedFileError(str(error)) from error
    finally:
        os.close(fd)


def _vector(fd: int, place: _Place) -> _native.Vector:
    values = np.frombuffer(os.pread(fd, place.nbytes, place.offset), dtype=np.float32)
    if 4 * values.size != place.nbytes:
        raise DamagedFileError(f"ends within {place.name}")
    return _native.Vector(values)


def write_packed(fd: int, key: str, program: Program, weights: PackedWeights) -> Iterator[int]:
    """Writes a file from its beginning; gives the bytes written after each piece. Raises OSError."""
    header_bytes = 0
    while True:  # the header's own length moves the offsets in it
        places = _places(program, weights.dtypes, PREFIX.size + DIGEST_BYTES + header_bytes)
        header = json.dumps({"key": key, "weights": [p.entry() for p in places]}, separators=(",", ":")).encode()
        if len(header) <= header_bytes:
            break
        header_bytes = len(header)
    header = header.ljust(header_bytes)
    prefix = PREFIX.pack(MAGIC, _native.PACKED_LAYOUT, len(header))
    yield _write(fd, memoryview(prefix + hashlib.sha256(header).digest() + header), 0)
    for place in places:
        owner = weights.vectors[place.name] if len(place.shape) == 1 else weights.matrices[place.name]
        data = owner.data.data
        for start in range(0, len(data), CHUNK_BYTES):
            yield _write(fd, data[start : start + CHUNK_BYTES], place.offset + start)
    os.ftruncate(fd, _end(places))


def _write(fd: int, data: memoryview, offset: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
    return done


def _read_header(fd: int) -> dict[str, Any]:
    start = os.pread(fd, PREFIX.size + DIGEST_BYTES, 0)
    if len(start) < PREFIX.size + DIGEST_BYTES:
        raise DamagedFileError(f"has {len(start)} bytes")
    magic, layout, length = PREFIX.unpack_from(start)
    if magic != MAGIC:
        raise DamagedFileError("is no file of packed weights")
    if layout != _native.PACKED_LAYOUT:
        raise StaleFileError(f"has layout {layout}, not {_native.PACKED_LAYOUT}")
    if length > MAX_HEADER_BYTES:
        raise DamagedFileError(f"says that its header has {length} bytes, at most {MAX_HEADER_BYTES} are read")
    text = os.pread(fd, length, PREFIX.size + DIGEST_BYTES)
    if hashlib.sha256(text).digest() != start[PREFIX.size :]:
        raise DamagedFileError("has a header of another sha256 than it says")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError("has a header that is not JSON") from error
    if not isinstance(header, dict):
        raise DamagedFileError("has a header that is no object")
    header["start"] = PREFIX.size + DIGEST_BYTES + length
    return header


def _checked(header: Mapping[str, Any], program: Program, size: int) -> list[_Place]:
    """The places of a header, where they are those of the program. Raises DamagedFileError."""
    entries = header.get("weights")
    if not isinstance(entries, list) or len(entries) != len(program.weights):
        raise DamagedFileError(f"must list {len(program.weights)} weights")
    dtypes = {}
    for weight, entry in zip(program.weights, entries, strict=True):
        if not isinstance(entry, list) or len(entry) != 5 or entry[0] != weight.name:
            raise DamagedFileError(f"has no place for {weight.name}")
        if not isinstance(entry[1], str) or entry[1] not in DType.__members__:
            raise DamagedFileError(f"{weight.name}: there is no type {str(entry[1])[:20]!r}")
        dtypes[weight.name] = DType[entry[1]]
    try:
        places = _places(program, dtypes, header["start"])
    except (ValueError, OverflowError) as error:
        raise DamagedFileError(str(error)) from error
    for place, entry in zip(places, entries, strict=True):
        if entry != place.entry():
            raise DamagedFileError(f"{place.name} must be {place.entry()[1:]}, not {str(entry[1:])[:100]}")
    if size != _end(places):
        raise DamagedFileError(f"has {size} bytes, its weights take {_end(places)}")
    return places


def _places(program: Program, dtypes: Mapping[str, DType], start: int) -> list[_Place]:
    """Where each weight lies behind a header that ends at `start`. Raises ValueError."""
    places = []
    offset = _aligned(start)
    for weight in program.weights:
        dtype = dtypes[weight.name]
        if len(weight.shape) == 1:
            nbytes = 4 * weight.num_elements
        else:
            nbytes = int(_native.packed_bytes(dtype.name, weight.num_elements // weight.shape[-1], weight.shape[-1]))
        places.append(_Place(weight.name, dtype, weight.shape, offset, nbytes))
        offset = _aligned(offset + nbytes)
    return places


def _end(places: list[_Place]) -> int:
    """Size of the file: kernels may read some bytes past a matrix."""
    return _aligned(places[-1].offset + places[-1].nbytes) + PAGE


def _aligned(offset: int) -> int:
    return (offset + PAGE - 1) // PAGE * PAGE
