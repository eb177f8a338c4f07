"""From settings to the parts of a scheduler."""

from __future__ import annotations

from collections.abc import Callable

from kvarn.config import SchedulerConfig
from kvarn.scheduler.budget import Budget, ConstantBudget, ItlBudget
from kvarn.scheduler.cost import StepCost
from kvarn.scheduler.fairness import FairShare
from kvarn.scheduler.policy import FirstComeFirstServed, Policy, PriorityClasses

_POLICIES: dict[str, Callable[[], Policy]] = {
    kind.name: kind for kind in (FirstComeFirstServed, PriorityClasses, FairShare)
}


def make_policy(name: str) -> Policy:
    """The policy of that name (one of `kvarn.config.POLICIES`), without sequences."""
    return _POLICIES[name]()


def make_budget(config: SchedulerConfig, cost: StepCost) -> Budget:
    """The budget that the settings ask for. cost: what predicts the steps of this engine."""
    if config.itl_target_ms is None:
        return ConstantBudget(config.max_num_batched_tokens)
    return ItlBudget(config.max_num_batched_tokens, config.itl_target_ms / 1000, cost)
