"""What `bench/trust.py` sees of the server from outside: its health, its numbers, its memory, its errors."""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

LIVE_EVERY, NUMBERS_EVERY = 0.1, 0.5
LOOK_SECONDS = 10.0


@dataclass
class Watch:
    """Everything seen. Times are of `time.perf_counter`."""

    live_seconds: list[float] = field(default_factory=list)
    live_failures: int = 0
    resident: list[tuple[float, float]] = field(default_factory=list)
    """Moment and MiB."""
    most_open_files: int = 0

    def growth(self, begin: float) -> tuple[float, float]:
        """(MiB a minute by least squares, MiB in the middle) of the samples since `begin`."""
        samples = [(moment, size) for moment, size in self.resident if moment >= begin]
        if len(samples) < 3:
            return 0.0, samples[-1][1] if samples else 0.0
        slope, _ = statistics.linear_regression(*zip(*samples, strict=True))
        return 60 * slope, statistics.median(size for _, size in samples)


async def watch(watched: Watch, session: aiohttp.ClientSession, url: str, pid: int) -> None:
    """Looks until it is cancelled."""

    async def live() -> None:
        while True:
            begin = time.perf_counter()
            try:
                async with session.get(f"{url}/health/live", timeout=aiohttp.ClientTimeout(LOOK_SECONDS)) as response:
                    watched.live_failures += response.status != 200
            except (aiohttp.ClientError, OSError, TimeoutError):
                watched.live_failures += 1
            watched.live_seconds.append(time.perf_counter() - begin)
            await asyncio.sleep(LIVE_EVERY)

    async def memory() -> None:
        while True:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            watched.resident.append((time.perf_counter(), pages * 4096 / 2**20))
            watched.most_open_files = max(watched.most_open_files, len(list(Path(f"/proc/{pid}/fd").iterdir())))
            await asyncio.sleep(NUMBERS_EVERY)

    async with asyncio.TaskGroup() as group:
        group.create_task(live())
        group.create_task(memory())


async def numbers(session: aiohttp.ClientSession, url: str, key: str) -> dict[str, float]:
    """`/metrics`, summed over labels, without the prefix `kvarn:`."""
    headers = {"Authorization": f"Bearer {key}"}
    async with session.get(f"{url}/metrics", headers=headers) as response:
        text = await response.text()
    found: dict[str, float] = {}
    for name, value in re.findall(r"^kvarn:(\w+)(?:\{[^}]*\})? (\S+)$", text, re.M):
        found[name] = found.get(name, 0.0) + float(value)
    return found


def tracebacks(log: Path) -> list[str]:
    """The last line of each traceback in the server's log: what was raised."""
    lines = log.read_text(errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines):
        if "Traceback (most recent call last)" in line:
            raised = next((later for later in lines[number + 1 :] if later and not later.startswith(" ")), "")
            found.append(raised[:200])
    return found
