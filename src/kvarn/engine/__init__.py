"""The engine: the loop of schedule, execute and update, and the two ways to talk to it.

`EngineCore` is one step at a time, `EngineLoop` runs it in a thread, `AsyncLLM` and `LLM` are its asyncio and its
blocking front. asyncio is imported with the first of the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvarn.engine.backends import backend_memory, engine_backend, make_backend, memory_elsewhere
from kvarn.engine.core import EngineCore
from kvarn.engine.events import EngineStats
from kvarn.engine.llm import LLM, Choice, Completion
from kvarn.engine.load import LoadedEngine, LoadTimes, build_engine, load_engine, model_name, plan_engine

if TYPE_CHECKING:
    from kvarn.engine.async_llm import AsyncLLM, RequestStream

__all__ = [
    "LLM", "AsyncLLM", "Choice", "Completion", "EngineCore", "EngineStats", "LoadTimes", "LoadedEngine",
    "RequestStream", "backend_memory", "build_engine", "engine_backend", "load_engine", "make_backend",
    "memory_elsewhere", "model_name", "plan_engine",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in ("AsyncLLM", "RequestStream"):
        from kvarn.engine import async_llm

        return getattr(async_llm, name)
    raise AttributeError(f"module 'kvarn.engine' has no attribute {name!r}")
