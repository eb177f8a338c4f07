"""Arrays of length-prefixed strings (a vocabulary of 262,144 is one) found and decoded without a Python step a string.

In the file a string is its length, a little-endian uint64, and then its bytes. A length below 256 is one byte and seven
zeros, a pattern that text hardly has, so that NumPy can point at all candidates at once. What counts is that each
string ends where the next candidate is; where that fails (empty strings, long ones, zeros in the text), strings are
walked one at a time.
"""

from __future__ import annotations

import struct
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MIN_CHUNK_BYTES = 1 << 12
MAX_CHUNK_BYTES = 1 << 20
WALKED_AT_ONCE = 64
LENGTH_BYTES = 8

_length_at = struct.Struct("<Q").unpack_from


class StringsError(ValueError):
    """index: the string at fault."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def find_strings(data: memoryview, start: int, count: int) -> tuple[NDArray[np.int64], int]:
    """Where each of `count` strings begins (its length field), and where the last ends.

    start: offset of the first. Raises StringsError where a string does not lie within the data.
    """
    found: list[NDArray[np.int64]] = []
    number, position, size = 0, start, len(data)
    chunk = MIN_CHUNK_BYTES
    while number < count:
        before = position
        starts = _short_strings(data[position : position + chunk], count - number) + position
        if starts.size:
            last = int(starts[-1])
            found.append(starts)
            number += starts.size
            position = last + LENGTH_BYTES + data[last]
        # What is looked at in vain was gone through before, so that all takes time in proportion to the bytes.
        chunk = min(2 * chunk, MAX_CHUNK_BYTES) if position - before > chunk // 2 else MIN_CHUNK_BYTES
        walked: list[int] = []
        while number < count and len(walked) < WALKED_AT_ONCE:
            if position + LENGTH_BYTES > size:
                raise StringsError(number, f"starts past the end, at byte {position} of {size}")
            walked.append(position)
            position += LENGTH_BYTES + _length_at(data, position)[0]
            number += 1
            if position > size:
                raise StringsError(number - 1, f"ends at byte {position} of {size}")
        found.append(np.array(walked, dtype=np.int64))
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64), position


def _short_strings(data: memoryview, most: int) -> NDArray[np.int64]:
    """Strings one after another from the first byte on, as far as the pattern shows them; each lies within the data."""
    block = np.frombuffer(data, dtype=np.uint8)
    if block.size < 2 * LENGTH_BYTES:
        return np.empty(0, dtype=np.int64)
    zero = block == 0
    pairs = zero[1:-1] & zero[2:]
    fours = pairs[:-2] & pairs[2:]
    # Seven zeros behind a byte: four, and four that overlap them by one.
    candidates = np.flatnonzero(fours[:-3] & fours[3:])
    ends = candidates + LENGTH_BYTES + block[candidates]
    follows = candidates[1:] == ends[:-1]
    if not candidates.size or candidates[0] != 0:
        return np.empty(0, dtype=np.int64)
    chain = candidates.size - 1 if follows.all() else int(np.argmin(follows))
    # The last candidate's own end is not seen: it is left to the next round.
    return candidates[: min(chain, most)].astype(np.int64)


def decode_strings(data: memoryview, starts: NDArray[np.int64], end: int) -> list[str]:
    """The strings that `find_strings` found. Raises StringsError where one is not UTF-8."""
    if not starts.size:
        return []
    first = int(starts[0])
    block = np.frombuffer(data[first:end], dtype=np.uint8)
    kept = np.ones(block.size, dtype=bool)
    for byte in range(LENGTH_BYTES - 1):
        kept[starts - first + byte] = False
    # The highest byte of a length is zero: it stays, and tells the strings apart unless they hold zeros themselves.
    try:
        strings = block[kept].tobytes().decode().split("\0")[1:]
    except UnicodeDecodeError:
        strings = []
    return strings if len(strings) == starts.size else _decode_each(data, [*starts.tolist(), end])


def _decode_each(data: memoryview, borders: list[int]) -> list[str]:
    strings = []
    for start, end in pairwise(borders):
        try:
            strings.append(str(data[start + LENGTH_BYTES : end], "utf-8"))
        except UnicodeDecodeError as error:
            raise StringsError(len(strings), "is not UTF-8") from error
    return strings
