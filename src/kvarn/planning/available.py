"""How much memory this process may still take: the machine's, or its control group's where that is less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 60
"""cgroup v1 says "no limit" with a number about as large as this or larger."""


@dataclass(frozen=True, slots=True)
class Available:
    """Memory that can be had, and what sets that limit, in words."""

    num_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class _Hierarchy:
    """Where a kind of control groups says what. used: entries of memory.stat that the kernel cannot give up."""

    name: str
    mount: str
    limits: tuple[str, ...]
    used: tuple[str, ...]


V1 = _Hierarchy("cgroup v1", "sys/fs/cgroup/memory", ("memory.limit_in_bytes",), ("total_rss", "total_shmem"))
V2 = _Hierarchy(
    "cgroup v2",
    "sys/fs/cgroup",
    ("memory.max", "memory.high"),
    ("anon", "shmem", "slab_unreclaimable", "kernel_stack", "pagetables", "sock"),
)


def available_memory(root: Path = Path("/")) -> Available:
    """What can be allocated without swapping, being slowed down or being killed, as of now.

    The least of /proc/meminfo's MemAvailable and what is left under the limit of the control group (v2 or v1) of this
    process and of every group above it. Page cache counts as free: the kernel gives it up. root: where /proc and /sys
    are, for tests. No bytes where the system says nothing.
    """
    amounts = [*_meminfo(root), *_control_groups(root)]
    return min(amounts, key=lambda amount: amount.num_bytes, default=Available(0, "the system does not say"))


def _meminfo(root: Path) -> Iterator[Available]:
    for line in _lines(root / "proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            yield Available(int(rest.split()[0]) * 1024, "the machine's free memory")


def _control_groups(root: Path) -> Iterator[Available]:
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            yield from _left(root, V2, path)
        elif "memory" in controllers.split(","):
            yield from _left(root, V1, path)


def _left(root: Path, kind: _Hierarchy, path: str) -> Iterator[Available]:
    """What is left under the limits of the group and of those above it (in a container, the mount is the group)."""
    mount, inside = root / kind.mount, Path(path.strip().lstrip("/"))
    # A container may be told of a group that it cannot see: then the mount itself is its group.
    groups = [mount] if ".." in inside.parts else [mount / inside, *(mount / above for above in inside.parents)]
    for group in dict.fromkeys(groups):
        stat = _stat(group / "memory.stat")
        used = sum(stat.get(key, 0) for key in kind.used)
        for name in kind.limits:
            limit = next(iter(_lines(group / name)), "max").strip()
            # v1 repeats here the least limit of all groups above, those that a container cannot see among them.
            inherited = stat.get("hierarchical_memory_limit", UNLIMITED)
            least = min(int(limit) if limit.isdigit() else UNLIMITED, inherited)
            if least < UNLIMITED:
                where = "/" if group == mount else f"/{group.relative_to(mount)}"
                yield Available(max(0, least - used), f"{kind.name} {where}, {name} {least}")


def _stat(path: Path) -> Mapping[str, int]:
    pairs = (line.split() for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
