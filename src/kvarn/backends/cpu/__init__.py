"""The CPU back-end: programs compiled to step plans (`compile`), laid out (`memory`), run natively (`executable`)."""

from kvarn.backends.cpu.backend import CpuBackend, available_isas
from kvarn.backends.cpu.executable import CpuExecutable, CpuInfo
from kvarn.backends.cpu.memory import CpuMemory, memory_use
from kvarn.backends.cpu.packed_slot import PackedSlot

__all__ = ["CpuBackend", "CpuExecutable", "CpuInfo", "CpuMemory", "PackedSlot", "available_isas", "memory_use"]
