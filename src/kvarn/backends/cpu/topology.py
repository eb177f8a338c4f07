"""How many threads the machine is good for: physical cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

SYSTEM = Path("/sys/devices/system/cpu")
CGROUP = Path("/sys/fs/cgroup")


def physical_cores(
    allowed: frozenset[int] | None = None, system: Path = SYSTEM, cgroup: Path = CGROUP
) -> tuple[tuple[int, ...], ...]:
    """The processors this process may use, grouped by physical core, in ascending order.

    Two hardware threads of one core are one group: they share its vector units, so more threads than cores add nothing
    to prefill. A cgroup's CPU quota (v2) limits the number of groups, rounded up. allowed: processors of the affinity
    mask (None: ask the system). Where the system tells no topology, every processor is a core.
    """
    if allowed is None:
        allowed = _affinity()
    groups: dict[tuple[int, ...], list[int]] = {}
    for cpu in sorted(allowed):
        siblings = _siblings(system / f"cpu{cpu}" / "topology" / "thread_siblings_list") or (cpu,)
        groups.setdefault(siblings, []).append(cpu)
    quota = _quota(cgroup / "cpu.max")
    most = len(groups) if quota is None else max(1, min(len(groups), math.ceil(quota)))
    return tuple(tuple(group) for group in groups.values())[:most]


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _siblings(path: Path) -> tuple[int, ...] | None:
    """A list such as "0-1,4" as numbers; None where the file is missing or unreadable."""
    try:
        cpus: list[int] = []
        for part in path.read_text(encoding="ascii").strip().split(","):
            low, _, high = part.partition("-")
            cpus.extend(range(int(low), int(high or low) + 1))
        return tuple(cpus) or None
    except (OSError, ValueError):
        return None


def _quota(path: Path) -> float | None:
    """Processors of a cgroup v2 quota ("max 100000" or "150000 100000"); None where there is none."""
    try:
        quota, period = path.read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
