"""`BlockFile`: KV blocks in a file of fixed size, each with its name and a checksum. What is wrong is not returned."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import ConfigError

MAGIC = b"kvarn KV blocks\x00"
VERSION = 1
PAGE = 4096
ENTRY = struct.Struct("<32s32sQ")
"""A slot's name, the checksum of name and content, and when it was written, counted in saves."""
Bytes = NDArray[np.uint8]


class BlockFile:
    """Slots of one block each in a file that one process has open at a time. Not thread-safe.

    Layout: a page with magic, version and geometry; the entries of all slots, to a whole page; the slots. An entry is
    cleared before its slot is written and set afterwards, and its checksum (BLAKE2b, 256 bits) covers the content, so
    a slot that was torn by a crash or changed by anybody counts as empty. All space is taken when the file is made:
    nothing grows later, and a full disk is told at start. Only its owner may read the file.
    """

    def __init__(self, path: Path, num_bytes: int, block_bytes: int, identity: str) -> None:
        """Opens the file, or makes it anew where it is of another identity or size.

        num_bytes: of all of it at most. identity: of whatever computes the blocks. Raises ConfigError where it is too
        small for a block, in use by another process, or cannot be made.
        """
        self.block_bytes = block_bytes
        self.num_slots, self._content = _geometry(num_bytes, block_bytes)
        if self.num_slots < 1:
            least = 2 * PAGE + block_bytes
            raise ConfigError(f"kv_offload_bytes must be at least {least}, room for one block, not {num_bytes}")
        text = f"{VERSION} {block_bytes} {self.num_slots} {identity}".encode()
        header = MAGIC + hashlib.blake2b(text, digest_size=32).digest()
        size = self._content + self.num_slots * block_bytes
        self._map = _open(path, header, size)
        self._bytes: Bytes = np.frombuffer(self._map, np.uint8)
        self._saves = max((self._entry(slot)[2] for slot in range(self.num_slots)), default=0)

    def present(self) -> Mapping[bytes, int]:
        """Slots by name as the entries have them, the one written first first. The contents are not looked at."""
        entries = [(*self._entry(slot), slot) for slot in range(self.num_slots)]
        return {name: slot for name, _, number, slot in sorted(entries, key=lambda entry: entry[2]) if number}

    def save(self, slot: int, name: bytes, read: Callable[[Bytes], None]) -> None:
        """Fills a slot with what `read` puts into uint8[block_bytes]."""
        content = self._slot(slot)
        self.clear(slot)
        read(content)
        self._saves += 1
        self._set_entry(slot, name, _checksum(name, content), self._saves)

    def clear(self, slot: int) -> None:
        """Empties a slot."""
        self._set_entry(slot, bytes(32), bytes(32), 0)

    def load(self, slot: int, name: bytes, write: Callable[[Bytes], None]) -> bool:
        """Hands the slot's content to `write`; False, and `write` not called, unless it is that of `name`."""
        kept, checksum, _ = self._entry(slot)
        content = self._slot(slot).copy()  # what is checked is what is used
        if kept != name or checksum != _checksum(name, content):
            return False
        write(content)
        return True

    def close(self) -> None:
        """Writes what is not on disk yet. Idempotent."""
        if not self._map.closed:
            del self._bytes
            self._map.flush()
            self._map.close()

    def _slot(self, slot: int) -> Bytes:
        start = self._content + slot * self.block_bytes
        return self._bytes[start : start + self.block_bytes]

    def _entry(self, slot: int) -> tuple[bytes, bytes, int]:
        name, checksum, number = ENTRY.unpack_from(self._map, PAGE + slot * ENTRY.size)
        return name, checksum, number

    def _set_entry(self, slot: int, name: bytes, checksum: bytes, number: int) -> None:
        ENTRY.pack_into(self._map, PAGE + slot * ENTRY.size, name, checksum, number)


def slots_in(num_bytes: int, block_bytes: int) -> int:
    """How many blocks a file of that size holds."""
    return max(0, (num_bytes - 2 * PAGE) // (block_bytes + ENTRY.size))


def _geometry(num_bytes: int, block_bytes: int) -> tuple[int, int]:
    """(slots that fit, where the first begins)."""
    slots = slots_in(num_bytes, block_bytes)
    return slots, PAGE + -(-slots * ENTRY.size // PAGE) * PAGE


def _checksum(name: bytes, content: Bytes) -> bytes:
    return hashlib.blake2b(content.data, key=name, digest_size=32).digest()


def _open(path: Path, header: bytes, size: int) -> mmap.mmap:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"kv_offload_dir: cannot open {path}: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_size != size or os.pread(handle, len(header), 0) != header:
            os.ftruncate(handle, 0)
            os.posix_fallocate(handle, 0, size)
            os.pwrite(handle, header, 0)
        # The map keeps a duplicate of the handle open, and with it the lock.
        return mmap.mmap(handle, size)
    except BlockingIOError:
        raise ConfigError(f"kv_offload_dir: {path} is in use by another process; give each its own folder") from None
    except OSError as error:
        raise ConfigError(f"kv_offload_bytes: cannot make {path} of {size} bytes: {error.strerror}") from error
    finally:
        os.close(handle)
