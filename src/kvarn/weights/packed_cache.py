"""The folder of packed weights: one file for each model that was loaded, the least recently used removed first.

What is in a file is the back-end's business; here it has a name, a size and a time of last use (its time of
modification, which a reader sets). Several processes may use the folder at once: files are put in place whole by
renaming, and one that is removed stays whole for those that have it mapped.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvarn.errors import ConfigError
from kvarn.weights.catalog import cache_dir

LIMIT_VARIABLE = "KVARN_PACKED_CACHE_BYTES"
DEFAULT_LIMIT_BYTES = 20_000_000_000
SUFFIX = ".packed"
TEMPORARY_SUFFIX = ".tmp"
ABANDONED_SECONDS = 3600.0
"""A temporary file this old was left by a process that was killed."""


@dataclass(frozen=True, slots=True)
class PackedModel:
    """One file of the folder. name: the model file's or folder's. last_used: seconds since 1970."""

    name: str
    path: Path
    bytes: int
    last_used: float


def packed_dir() -> Path:
    """Beside the folder of pulled models."""
    return cache_dir() / "packed"


def limit_bytes(setting: int | None) -> int:
    """Bytes that all files may take together: the setting, else KVARN_PACKED_CACHE_BYTES, else 20 GB; 0: none are kept.

    Raises ConfigError where the environment's value is not a whole number of bytes.
    """
    if setting is not None:
        return setting
    value = os.environ.get(LIMIT_VARIABLE, "")
    if not value:
        return DEFAULT_LIMIT_BYTES
    if not value.isascii() or not value.isdigit() or len(value) > 18:
        raise ConfigError(f"{LIMIT_VARIABLE} must be a number of bytes, 0 or more, not {value[:40]!r}")
    return int(value)


def packed_path(model: Path, part: str = "") -> Path:
    """Where the packed weights of a model file or folder lie. part: tells what is packed of it, where it is not all."""
    resolved = model.resolve()
    name = resolved.name if resolved.is_dir() else resolved.stem
    plain = re.sub(r"[^\w.-]", "_", name)[:100]
    digest = hashlib.sha256(os.fsencode(resolved) + part.encode()).hexdigest()
    return packed_dir() / f"{plain}-{digest[:12]}{SUFFIX}"


def packed_models() -> list[PackedModel]:
    """All files, the most recently used first."""
    found = []
    with suppress(OSError):
        for path in packed_dir().iterdir():
            if path.suffix == SUFFIX:
                with suppress(OSError):
                    status = path.stat()
                    name = path.stem.rpartition("-")[0]
                    found.append(PackedModel(name, path, status.st_size, status.st_mtime))
    return sorted(found, key=lambda model: (-model.last_used, model.path))


def make_room(path: Path, needed: int, limit: int) -> bool:
    """Removes files until one of `needed` bytes at `path` fits within the limit.

    The least recently used go first. False, and nothing is removed, where it cannot fit.
    """
    if needed > limit:
        return False
    others = [model for model in packed_models() if model.path != path]
    total = needed + sum(model.bytes for model in others)
    while total > limit:
        oldest = others.pop()
        total -= oldest.bytes
        with suppress(FileNotFoundError):
            oldest.path.unlink()
    _remove_abandoned(path.parent)
    return True


def remove(name: str) -> Sequence[PackedModel]:
    """Removes a model's packed weights, by name or file name, or those of "all". Returns what was removed."""
    chosen = [model for model in packed_models() if name in ("all", model.name, model.path.name)]
    for model in chosen:
        with suppress(FileNotFoundError):
            model.path.unlink()
    return chosen


def _remove_abandoned(folder: Path) -> None:
    with suppress(OSError):
        for path in folder.iterdir():
            if path.suffix == TEMPORARY_SUFFIX and path.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
