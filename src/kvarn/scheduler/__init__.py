"""Decides who computes how many tokens in each step. Standard library only: ids and counts, no arrays.

`Scheduler` is the token-budget loop, `Sequence` one running stream, `Policy` the order in which sequences are served,
`Budget` the size of a step.
"""

from kvarn.scheduler.admission import Limits
from kvarn.scheduler.budget import Budget, ConstantBudget, ItlBudget
from kvarn.scheduler.build import make_budget, make_policy
from kvarn.scheduler.cost import StepCost, StepShape
from kvarn.scheduler.fairness import FairShare
from kvarn.scheduler.observer import Hold, NullObserver, Observer, StepTimes
from kvarn.scheduler.policy import FirstComeFirstServed, Policy, PriorityClasses
from kvarn.scheduler.scheduler import Scheduler
from kvarn.scheduler.sequence import Sequence

__all__ = [
    "Budget", "ConstantBudget", "FairShare", "FirstComeFirstServed", "Hold", "ItlBudget", "Limits", "NullObserver",
    "Observer", "Policy", "PriorityClasses", "Scheduler", "Sequence", "StepCost", "StepShape", "StepTimes",
    "make_budget", "make_policy",
]  # fmt: skip
