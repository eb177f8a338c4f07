"""The memory of several models under one budget, planned before any of them is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvarn.config import EngineConfig
from kvarn.engine import backend_memory, plan_engine
from kvarn.errors import CapacityError
from kvarn.planning import Available, MemoryPlan
from kvarn.planning.sizes import size_text
from kvarn.server.models.hosted import ModelSpec
from kvarn.server.models.pooled import PooledModel

Planner = Callable[[str, EngineConfig, Available], MemoryPlan]


@dataclass(frozen=True, slots=True)
class Budget:
    """What models may take. num_bytes: all together; None: one model alone, which plans for itself when it is loaded.

    rooms, plans: by model name; empty where num_bytes is None.
    """

    specs: tuple[ModelSpec, ...]
    num_bytes: int | None
    rooms: Mapping[str, Available]
    plans: Mapping[str, MemoryPlan]

    def pooled(self) -> list[PooledModel]:
        """The models as a pool takes them."""
        return [
            PooledModel(spec.name, plan.total, spec.aliases, plan.max_model_len, spec.keep_seconds)
            if (plan := self.plans.get(spec.name))
            else PooledModel(spec.name, 0, spec.aliases, None, spec.keep_seconds)
            for spec in self.specs
        ]


def share_out(
    specs: Sequence[ModelSpec],
    wanted: int | None,
    *,
    plan: Planner = plan_engine,
    available: Callable[[], Available] | None = None,
) -> Budget:
    """Plans each model within an equal share of the budget, so that all are in memory together. One that does not fit a
    share, or could not have its longest sequences there, may take the whole budget: others go while it is in memory.

    wanted: the budget's bytes; None: what memory_utilization leaves of the memory there is now. available: says how
    much that is; None: the memory of the back-end that the first model's settings name, which all have.
    Raises CapacityError with the numbers where the budget exceeds the memory, or a model the budget.
    """
    if wanted is None and len(specs) == 1:
        return Budget(tuple(specs), None, {}, {})
    now = backend_memory(specs[0].engine) if available is None else available()
    whole = _whole(wanted, specs[0].engine.cache.memory_utilization, now)
    share = Available(whole.num_bytes // len(specs), f"{whole.source}, shared by {len(specs)} models")
    planned = [_within(spec) for spec in specs]
    rooms, plans = dict[str, Available](), dict[str, MemoryPlan]()
    for spec in planned:
        try:
            alone = plan(spec.source, spec.engine, whole)
        except CapacityError as error:
            raise CapacityError(f"{spec.name} does not fit: {error}") from None
        room, chosen = share, _fitting(plan, spec, share)
        if chosen is None or chosen.max_model_len < alone.max_model_len:
            room, chosen = whole, alone
        rooms[spec.name], plans[spec.name] = room, chosen
    return Budget(tuple(planned), whole.num_bytes, rooms, plans)


def _whole(wanted: int | None, utilization: float, available: Available) -> Available:
    if wanted is None:
        return Available(int(available.num_bytes * utilization), f"{utilization:g} of {available.source}")
    if wanted > available.num_bytes:
        raise CapacityError(
            f"memory_budget is {size_text(wanted)}, but {size_text(available.num_bytes)} are available "
            f"({available.source})"
        )
    return Available(wanted, "--memory-budget")


def _within(spec: ModelSpec) -> ModelSpec:
    """The same, to take all of the room that is set apart for it."""
    cache = dataclasses.replace(spec.engine.cache, memory_utilization=1.0)
    return dataclasses.replace(spec, engine=dataclasses.replace(spec.engine, cache=cache))


def _fitting(plan: Planner, spec: ModelSpec, room: Available) -> MemoryPlan | None:
    try:
        return plan(spec.source, spec.engine, room)
    except CapacityError:
        return None
