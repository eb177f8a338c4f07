"""How long work takes at least under the machine's roof."""

from __future__ import annotations

from enum import StrEnum

from kvarn.backends.cpu import Cost
from kvarn.bench.roofline import Roof


class Limit(StrEnum):
    """What work cannot be faster than."""

    MEMORY = "memory"
    ARITHMETIC = "arithmetic"


def bound(cost: Cost, roof: Roof) -> tuple[float, Limit]:
    """Seconds that the work takes at least, and which limit says so."""
    memory = cost.bytes / roof.read_bytes
    arithmetic = cost.integer_macs / roof.integer_macs + cost.float_macs / roof.float_macs
    return (memory, Limit.MEMORY) if memory >= arithmetic else (arithmetic, Limit.ARITHMETIC)
