"""How much memory this process may still take: the machine's, or its container's where that is less."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

UNLIMITED = 1 << 60
"""cgroup v1 says "no limit" with a number about as large as this or larger."""


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be allocated without swapping or being killed, as of now.

    The least of /proc/meminfo's MemAvailable and what is left under the limit of each control group (v2 or v1) of
    this process. Page cache counts as free: the kernel gives it up. root: where /proc and /sys are, for tests.
    """
    amounts = [_meminfo(root), *_control_groups(root)]
    return min((amount for amount in amounts if amount is not None), default=0)


def _meminfo(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _control_groups(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _left(root / "sys/fs/cgroup", path, "memory.max", "anon")
        elif "memory" in controllers.split(","):
            yield from _left(root / "sys/fs/cgroup/memory", path, "memory.limit_in_bytes", "total_rss")


def _left(mount: Path, path: str, limit_file: str, used_key: str) -> Iterator[int]:
    """What is left under the limits of the group and of those above it (in a container, the mount is the group)."""
    inside = Path(path.strip().lstrip("/"))
    # A container may be told of a group that it cannot see: then the mount itself is its group.
    groups = [mount] if ".." in inside.parts else [mount / inside, *(mount / above for above in inside.parents)]
    for group in dict.fromkeys(groups):
        limit = next(iter(_lines(group / limit_file)), "max").strip()
        if limit.isdigit() and int(limit) < UNLIMITED:
            used = next((line.split()[1] for line in _lines(group / "memory.stat") if line.split()[0] == used_key), "0")
            yield max(0, int(limit) - int(used))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
