"""`fingerprint`: which bytes a weight file holds, without reading a gigabyte.

A file counts as the same while its inode, size, times of modification and of status change (what make and git look
at) and the sha256 of its header stay the same. The time of status change is set by the kernel with every write and
cannot be set back, so a file changed in place with its old date put back is another one all the same. Not taken: the
path, and the device's number, which may differ after a restart of a machine or container. Samples of the content
would cost more and prove less: a changed weight may lie between them. The catalog's sha256 is of no use here: it held
for the file when it was pulled, and whether it still is that one is the question.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileState:
    """What changes with every write to a file. Take it from the open file, before anything is read."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @staticmethod
    def of(status: os.stat_result) -> FileState:
        """The state that a stat tells."""
        return FileState(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Source:
    """One opened file: where, as it was when it was opened, and its header."""

    path: Path
    state: FileState
    header: bytes | memoryview

    def unchanged(self) -> bool:
        """Whether the path still has what was opened."""
        try:
            return FileState.of(os.stat(self.path)) == self.state
        except OSError:
            return False


def fingerprint(sources: Sequence[Source]) -> str:
    """One name for the content of all of the files, in their order."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.state}\n".encode())
        digest.update(hashlib.sha256(source.header).digest())
    return digest.hexdigest()
