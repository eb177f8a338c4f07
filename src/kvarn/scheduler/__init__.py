"""Decides who computes how many tokens in each step. Standard library only: ids and counts, no arrays.

`Scheduler` is the token-budget loop, `Sequence` one running stream, `Policy` the order in which sequences are served,
`Budget` the size of a step, `Speculation` how many tokens are guessed ahead, `Forecast` when a newcomer would have its
first token. `make_scheduler` puts them together.
"""

from kvarn.scheduler.admission import Backlog, Limits
from kvarn.scheduler.auto import AutoSpeculation
from kvarn.scheduler.budget import Budget, ConstantBudget, ItlBudget
from kvarn.scheduler.build import make_budget, make_policy, make_scheduler, make_speculation
from kvarn.scheduler.cost import StepCost, StepShape
from kvarn.scheduler.costly import CostlySpeculation
from kvarn.scheduler.fairness import FairShare
from kvarn.scheduler.forecast import Forecast, QueueForecast
from kvarn.scheduler.measured import MeasuredCost
from kvarn.scheduler.moves import AlwaysMove, MoveCost, Moves
from kvarn.scheduler.observer import Hold, NullObserver, Observer, StepTimes
from kvarn.scheduler.policy import FirstComeFirstServed, Policy, PriorityClasses
from kvarn.scheduler.scheduler import Scheduler
from kvarn.scheduler.sequence import Sequence
from kvarn.scheduler.speculation import FixedSpeculation, NoSpeculation, Speculation
from kvarn.scheduler.two_sources import TwoSources

__all__ = [
    "AlwaysMove", "AutoSpeculation", "Backlog", "Budget", "ConstantBudget", "CostlySpeculation", "FairShare",
    "FirstComeFirstServed", "FixedSpeculation", "Forecast", "Hold", "ItlBudget", "Limits", "MeasuredCost", "MoveCost",
    "Moves", "NoSpeculation", "NullObserver", "Observer", "Policy", "PriorityClasses", "QueueForecast", "Scheduler",
    "Sequence", "Speculation", "StepCost", "StepShape", "StepTimes", "TwoSources", "make_budget", "make_policy",
    "make_scheduler", "make_speculation",
]  # fmt: skip
