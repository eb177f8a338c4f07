"""Back-ends run programs. They know no model family, and not one another; `base` is all they share."""

from kvarn.backends.base import Backend, Executable, InputBatch, KvCacheSpec, MemoryPart, MemoryUse, StepLimits

__all__ = ["Backend", "Executable", "InputBatch", "KvCacheSpec", "MemoryPart", "MemoryUse", "StepLimits"]
