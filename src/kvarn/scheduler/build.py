"""From settings to the parts of a scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvarn.cache import BlockPool, PrefixCache
from kvarn.config import SchedulerConfig, SpeculativeConfig
from kvarn.scheduler.auto import AutoSpeculation
from kvarn.scheduler.budget import Budget, ConstantBudget, ItlBudget
from kvarn.scheduler.cost import StepCost
from kvarn.scheduler.costly import CostlySpeculation
from kvarn.scheduler.drafting import DraftLimits
from kvarn.scheduler.fairness import FairShare
from kvarn.scheduler.forecast import QueueForecast
from kvarn.scheduler.moves import Moves
from kvarn.scheduler.observer import Observer
from kvarn.scheduler.policy import FirstComeFirstServed, Policy, PriorityClasses
from kvarn.scheduler.scheduler import Scheduler
from kvarn.scheduler.speculation import FixedSpeculation, NoSpeculation, Speculation
from kvarn.scheduler.two_sources import TwoSources

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


def make_speculation(config: SpeculativeConfig | None, cost: StepCost) -> Speculation:
    """Who decides how many tokens are guessed, as the settings say. cost: what predicts the steps of this engine."""
    if config is None:
        return NoSpeculation()
    if config.k is not None:
        return FixedSpeculation(config.most, config.most_copies, config.p_min)
    stops = config.source == "draft"
    if config.looks_up_first:
        return TwoSources(config.most, config.most_copies, cost, stops=stops)
    if config.costly:
        return CostlySpeculation(config.most, cost, stops=stops)
    return AutoSpeculation(config.most, cost)


def make_scheduler(
    config: SchedulerConfig,
    pool: BlockPool,
    max_model_len: int,
    cost: StepCost,
    *,
    eos_token_ids: Iterable[int] = (),
    prefix_cache: PrefixCache | None = None,
    moves: Moves | None = None,
    observer: Observer | None = None,
    speculative: SpeculativeConfig | None = None,
    reference_every: int = 0,
) -> Scheduler:
    """The scheduler that the settings ask for, empty. pool: owned by it. cost: see `make_budget`.
    reference_every: of the type of cache (`KvType`)."""
    budget = make_budget(config, cost)
    return Scheduler(
        config,
        pool,
        max_model_len,
        eos_token_ids=eos_token_ids,
        policy=make_policy(config.policy),
        budget=budget,
        forecast=QueueForecast(budget, cost),
        prefix_cache=prefix_cache,
        moves=moves,
        observer=observer,
        speculation=make_speculation(speculative, cost),
        draft_limits=_draft_limits(speculative, max_model_len, reference_every),
    )


def _draft_limits(speculative: SpeculativeConfig | None, max_model_len: int, reference_every: int) -> DraftLimits:
    if speculative is None:
        return DraftLimits(0, max_model_len, reference_every)
    return DraftLimits(speculative.max_step_drafts, max_model_len, reference_every, speculative.writes_ahead)
