"""What a measurement ran on: processor, cores, memory."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from kvarn.backends.cpu.topology import physical_cores

CPU_INFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

CORES_NAMED = 4
BUSY = 0.25
"""Share of the hardware threads that others may use."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine, as far as this process may use it."""

    cpu: str
    cores: tuple[tuple[int, ...], ...]
    """Processors by physical core: those of one core share its vector units."""
    last_cache_bytes: int
    """Of the largest cache; 0 where the system does not say."""
    memory_bytes: int
    system: str
    load: float
    """Threads that wanted to run, on average over the minute before."""

    @property
    def threads(self) -> int:
        """Hardware threads."""
        return sum(len(core) for core in self.cores)

    @property
    def busy(self) -> bool:
        """Whether others used so much of it that figures are disturbed."""
        return self.load > BUSY * self.threads

    @property
    def sharing(self) -> str:
        """What the threads share, in words."""
        cores, threads = len(self.cores), self.threads
        if threads == cores:
            return f"{_count(threads, 'thread')} on {_count(cores, 'physical core')}, one each"
        named = ["+".join(map(str, core)) for core in self.cores if len(core) > 1]
        rest = ", …" if len(named) > CORES_NAMED else ""
        shared = ", ".join(named[:CORES_NAMED]) + rest
        return f"{_count(threads, 'thread')} on {_count(cores, 'physical core')} (one core: {shared})"


def machine() -> Machine:
    """This machine."""
    return Machine(
        cpu=cpu_name(CPU_INFO),
        cores=physical_cores(),
        last_cache_bytes=last_cache_bytes(CACHES),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.release()}",
        load=round(os.getloadavg()[0], 2),
    )


def cpu_name(info: Path) -> str:
    """The processor's name as Linux gives it, else the architecture's."""
    try:
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line)
    return next(named, platform.machine())


def last_cache_bytes(caches: Path) -> int:
    """Size of the largest cache that Linux lists."""
    sizes = [_size(path) for path in caches.glob("index*/size")]
    return max(sizes, default=0)


def _size(path: Path) -> int:
    try:
        text = path.read_text(encoding="ascii").strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        return int(text.rstrip("KMG")) * unit
    except (OSError, ValueError):
        return 0


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")
