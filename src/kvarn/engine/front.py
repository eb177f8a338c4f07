"""What the two fronts of an engine share: the thread they start, and what they tell of the model."""

from __future__ import annotations

import weakref

from kvarn.config import EngineConfig
from kvarn.engine.events import EngineStats
from kvarn.engine.load import LoadedEngine, LoadTimes
from kvarn.engine.loop import EngineLoop
from kvarn.models import ModelConfig
from kvarn.planning import MemoryPlan
from kvarn.text import Tokenizer


class EngineFront:
    """A loaded engine that runs in a thread of its own."""

    def __init__(self, engine: LoadedEngine) -> None:
        """Starts the engine's thread. engine: owned from now on."""
        self._engine = engine
        config = engine.config
        self._loop = EngineLoop(engine.core, config.scheduler, config.restart_delays)
        self._closer = weakref.finalize(self, self._loop.close)
        """Closes the engine when nobody holds this object any more, and at the interpreter's exit."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._engine.tokenizer

    @property
    def model_name(self) -> str:
        """A name for the model: the catalogued one, or the file's or folder's."""
        return self._engine.name

    @property
    def model_config(self) -> ModelConfig:
        """Sizes and ids of the model."""
        return self._engine.model_config

    @property
    def config(self) -> EngineConfig:
        """The engine's settings."""
        return self._engine.config

    @property
    def max_model_len(self) -> int:
        """Most tokens of one sequence, prompt and output together."""
        return self._engine.max_model_len

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """What the engine takes, all allocated at load; None where the engine was put together by hand."""
        return self._engine.memory_plan

    @property
    def load_times(self) -> LoadTimes | None:
        """What loading took, by its parts; None where the engine was put together by hand."""
        return self._engine.load_times

    def stats(self) -> EngineStats:
        """A snapshot of the engine."""
        return self._loop.stats()
