"""Models in memory as the server has them, and the loaders that bring them there."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kvarn.config import EngineConfig
from kvarn.engine import AsyncLLM, backend_memory
from kvarn.errors import CapacityError
from kvarn.planning import Available, MemoryPlan
from kvarn.planning.sizes import size_text
from kvarn.scheduler import Observer
from kvarn.server.models.pool import ModelPool
from kvarn.server.models.pooled import PooledModel
from kvarn.server.prompts import PromptEncoder

logger = logging.getLogger("kvarn.server")
OnPlan = Callable[[str, MemoryPlan], None]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model to be served. source: a path, a catalogued name. aliases: other names that requests may give it."""

    name: str
    source: str
    engine: EngineConfig = field(default_factory=EngineConfig)
    aliases: tuple[str, ...] = ()
    keep_seconds: float | None = None
    """How long it stays after its last request; None: what holds for all."""


class HostedModel:
    """An engine, and what makes its prompts."""

    def __init__(self, llm: AsyncLLM, *, owned: bool = True) -> None:
        """owned: whether `close` closes the engine. Takes milliseconds."""
        self.llm = llm
        self.prompts = PromptEncoder(llm)
        self._owned = owned

    @property
    def is_running(self) -> bool:
        """False once the engine has failed for good."""
        return self.llm.is_running

    async def close(self) -> None:
        """Closes the engine, where it is owned, and has its memory given back to the system."""
        if self._owned:
            await self.llm.close()
            gc.unfreeze()


class GivenLoader:
    """For an engine that is there already and belongs to somebody else."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    async def load(self, _name: str) -> HostedModel:
        """The engine, again."""
        return HostedModel(self._llm, owned=False)


class NeverLoader:
    """For a server whose model does not come."""

    async def load(self, name: str) -> HostedModel:
        """Waits for ever."""
        await asyncio.Event().wait()
        raise AssertionError(name)


def given(llm: AsyncLLM | None, names: Sequence[str]) -> ModelPool[HostedModel]:
    """A pool of one engine that somebody else owns, under these names and its own; None: a model that never comes."""
    if llm is None:
        return ModelPool([PooledModel(names[0] if names else "model")], NeverLoader())
    every = tuple(dict.fromkeys((*names, llm.model_name)))
    pool = ModelPool([PooledModel(every[0], 0, every[1:])], GivenLoader(llm))
    pool.adopt(every[0], HostedModel(llm, owned=False))
    return pool


class EngineLoader:
    """Loads the models of specs in a thread, one at a time, each within the memory that is set apart for it."""

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        rooms: Mapping[str, Available],
        *,
        on_plan: OnPlan = lambda _name, _plan: None,
        observer: Observer | None = None,
        available: Callable[[], Available] | None = None,
    ) -> None:
        """rooms: memory by model name; a model that is not in it may have what the machine has when it is loaded.
        on_plan: told of each plan before weights are read, in another thread. observer: of all engines. available: what
        there is when a model is loaded, where others may have taken of it since it was planned; None: see
        `backend_memory`.
        """
        self._specs = {spec.name: spec for spec in specs}
        self._rooms = rooms
        self._on_plan = on_plan
        self._observer = observer
        self._available = available
        self._has_loaded = False

    async def load(self, name: str) -> HostedModel:
        """Raises what `load_engine` raises."""
        return await asyncio.to_thread(self._load, self._specs[name])

    def _load(self, spec: ModelSpec) -> HostedModel:
        def planned(plan: MemoryPlan) -> None:
            self._check(spec, plan)
            self._on_plan(spec.name, plan)

        started = time.perf_counter()
        llm = AsyncLLM.from_model(
            spec.source,
            spec.engine,
            on_plan=planned,
            observer=self._observer,
            available=self._rooms.get(spec.name),
        )
        hosted = HostedModel(llm)
        self._spare_collector()
        logger.info("loaded %s in %.2f s", spec.name, time.perf_counter() - started)
        return hosted

    def _spare_collector(self) -> None:
        """Has the garbage collector leave out what is there now, until a model is unloaded.

        To look at all objects of a vocabulary takes it 50 ms, in which nobody is answered, and it finds nothing.
        """
        if self._has_loaded:
            gc.collect()  # what an unloaded model has left must not stay for good
        self._has_loaded = True
        gc.freeze()

    def _check(self, spec: ModelSpec, plan: MemoryPlan) -> None:
        """Raises CapacityError where the machine has not now what the plan takes."""
        now = backend_memory(spec.engine) if self._available is None else self._available()
        if plan.total > now.num_bytes:
            have = f"{size_text(now.num_bytes)} are available now ({now.source})"
            raise CapacityError(f"it takes {size_text(plan.total)}, but {have}")
