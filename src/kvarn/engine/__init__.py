"""The engine: the loop of schedule, execute and update, and the two ways to talk to it.

`EngineCore` is one step at a time, `EngineLoop` runs it in a thread, `AsyncLLM` and `LLM` are its asyncio and its
blocking front.
"""

from kvarn.engine.async_llm import AsyncLLM, RequestStream
from kvarn.engine.core import EngineCore
from kvarn.engine.events import EngineStats
from kvarn.engine.llm import LLM, Choice, Completion
from kvarn.engine.load import LoadedEngine, build_engine, load_engine, make_backend, model_name

__all__ = [
    "LLM", "AsyncLLM", "Choice", "Completion", "EngineCore", "EngineStats", "LoadedEngine", "RequestStream",
    "build_engine", "load_engine", "make_backend", "model_name",
]  # fmt: skip
