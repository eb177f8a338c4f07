"""What the machine can do at most: bytes read and multiply-adds a second, at several numbers of threads.

The roofline model: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model" (2009).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvarn import _native
from kvarn.backends.cpu.topology import physical_cores
from kvarn.bench.machine import Machine
from kvarn.errors import ConfigError

MIB = 1 << 20
SMALLEST_BUFFER = 256 * MIB
CACHES_IN_BUFFER = 4
"""The buffer that is read is so many times the last cache."""
PASSES = 30
PROBE_PASSES = 6
"""Of a look at the roof between two measurements."""
PASS_SECONDS = 0.008
"""Short, so that among many some are undisturbed by whatever else the machine does."""
ITEMS = 16
"""Pieces of a pass for each thread."""
FIRST_ITERATIONS = 2000
MAX_THREADS = 1024


@dataclass(frozen=True, slots=True)
class Roof:
    """The best of several passes, per second, all threads together. A multiply-add counts as one."""

    threads: int
    read_bytes: float
    integer_macs: float
    """Of an unsigned and a signed byte (VNNI where the machine has it)."""
    float_macs: float
    """Of float32."""


@dataclass(frozen=True, slots=True)
class Rooflines:
    """Roofs of one instruction set by number of threads."""

    isa: str
    buffer_bytes: int
    roofs: tuple[Roof, ...]


def buffer_bytes(machine: Machine) -> int:
    """Size of the buffer: far beyond the caches, within an eighth of the memory."""
    wanted = max(SMALLEST_BUFFER, CACHES_IN_BUFFER * machine.last_cache_bytes)
    return max(16, min(wanted, machine.memory_bytes // 8) // MIB) * MIB


def default_threads(machine: Machine) -> tuple[int, ...]:
    """1, 2, 4, …, and the numbers of cores and of hardware threads."""
    powers = {1 << i for i in range(machine.threads.bit_length()) if 1 << i <= machine.threads}
    return tuple(sorted(powers | {len(machine.cores), machine.threads}))


def measure_rooflines(
    isa: str, threads: Sequence[int], num_bytes: int, progress: Callable[[int, int], None] | None = None
) -> Rooflines:
    """Measures; about a second for each number of threads. progress(done, total) is called after each.

    Raises ConfigError where a number of threads is out of range.
    """
    for count in threads:
        if not 1 <= count <= MAX_THREADS:
            raise ConfigError(f"threads must be between 1 and {MAX_THREADS}, not {count}")
    roofs = []
    native: _native.Roofline | None = None
    for index, count in enumerate(threads):
        pool = _native.Pool(count, pins(count))
        if native is None:
            native = _native.Roofline(isa, num_bytes, pool)
        roofs.append(_measure(native, pool, PASSES))
        if progress is not None:
            progress(index + 1, len(threads))
    return Rooflines(isa, num_bytes, tuple(roofs))


class RoofProbe:
    """Measures the roof at one number of threads, as often as it is called, in about a quarter of a second each.

    What a machine can do changes while it is measured, on a virtual one twofold within seconds: the roof of a
    measurement is the one that was there around it.
    """

    def __init__(self, isa: str, threads: int, machine: Machine) -> None:
        """Allocates the buffer that is read."""
        self._pool = _native.Pool(threads, pins(threads))
        self._native = _native.Roofline(isa, buffer_bytes(machine), self._pool)

    def __call__(self) -> Roof:
        """The roof now."""
        return _measure(self._native, self._pool, PROBE_PASSES)


def middle(roofs: Sequence[Roof]) -> Roof:
    """The median of at least one roof of the same number of threads, in each figure; of two it is their mean."""
    return Roof(
        roofs[0].threads,
        statistics.median(roof.read_bytes for roof in roofs),
        statistics.median(roof.integer_macs for roof in roofs),
        statistics.median(roof.float_macs for roof in roofs),
    )


def pins(threads: int) -> list[list[int]]:
    """Processors of each thread as the CPU back-end pins them: a core each where there are as many."""
    cores = physical_cores()
    return [list(core) for core in cores] if threads == len(cores) else []


def _measure(native: _native.Roofline, pool: _native.Pool, passes: int) -> Roof:
    read = max(amount / seconds for amount, seconds in (native.read(pool) for _ in range(passes)))
    return Roof(
        threads=pool.threads,
        read_bytes=read,
        integer_macs=_peak(lambda iterations: native.integer(pool, iterations, ITEMS), passes),
        float_macs=_peak(lambda iterations: native.floating(pool, iterations, ITEMS), passes),
    )


def _peak(run: Callable[[int], tuple[float, float]], passes: int) -> float:
    """The best rate of passes that last about PASS_SECONDS each."""
    seconds = min(run(FIRST_ITERATIONS)[1] for _ in range(passes))
    iterations = max(FIRST_ITERATIONS, int(FIRST_ITERATIONS * PASS_SECONDS / seconds))
    return max(amount / seconds for amount, seconds in (run(iterations) for _ in range(passes)))
