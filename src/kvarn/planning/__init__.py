"""The plan before the load: bytes and operations of a model, from the same program that runs."""

from kvarn.planning.plan import Plan, StepCost, plan

__all__ = ["Plan", "StepCost", "plan"]
