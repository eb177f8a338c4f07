"""The plan before the load: bytes and operations of a model, from the same program that runs."""

from kvarn.planning.available import Available, available_memory
from kvarn.planning.memory import MemoryPlan, Uses, plan_memory
from kvarn.planning.plan import Plan, StepCost, plan

__all__ = ["Available", "MemoryPlan", "Plan", "StepCost", "Uses", "available_memory", "plan", "plan_memory"]
