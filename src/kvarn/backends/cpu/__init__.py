"""The CPU back-end: programs compiled to step plans (`compile`), laid out (`memory`), run natively (`executable`)."""

from kvarn.backends.cpu.backend import CpuBackend, available_isas
from kvarn.backends.cpu.costs import Cost, StageCost, stage_costs, step_cost
from kvarn.backends.cpu.executable import CpuExecutable, CpuInfo, StageCounter
from kvarn.backends.cpu.memory import memory_use
from kvarn.backends.cpu.packed_slot import PackedSlot

__all__ = [
    "Cost",
    "CpuBackend",
    "CpuExecutable",
    "CpuInfo",
    "PackedSlot",
    "StageCost",
    "StageCounter",
    "available_isas",
    "memory_use",
    "stage_costs",
    "step_cost",
]
