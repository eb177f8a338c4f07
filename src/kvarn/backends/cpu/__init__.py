"""The CPU back-end: programs compiled to step plans (`compile`), laid out (`memory`), run natively (`executable`)."""

from kvarn.backends.cpu.backend import CpuBackend, available_isas
from kvarn.backends.cpu.executable import CpuExecutable, CpuInfo
from kvarn.backends.cpu.memory import CpuMemory, held_bytes, memory_use

__all__ = ["CpuBackend", "CpuExecutable", "CpuInfo", "CpuMemory", "available_isas", "held_bytes", "memory_use"]
