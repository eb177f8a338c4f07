"""Which back-end runs an engine, and the memory that it is planned for."""

from __future__ import annotations

from kvarn.backends import Backend
from kvarn.backends.cpu import CpuBackend, PackedSlot
from kvarn.config import BACKENDS, CudaConfig, EngineConfig
from kvarn.errors import ConfigError
from kvarn.planning import Available, available_memory
from kvarn.planning.sizes import size_text


def make_backend(
    name: str, threads: int = 0, packed: PackedSlot | None = None, cuda: CudaConfig | None = None
) -> Backend:
    """The back-end of that name. threads and packed: see `CpuBackend`. Raises ConfigError."""
    match name:
        case "cpu":
            return CpuBackend(threads=threads, packed=packed)
        case "cuda":
            from kvarn.backends.cuda import CudaBackend

            return CudaBackend(cuda or CudaConfig())
        case "reference":
            from kvarn.backends.reference import ReferenceBackend

            return ReferenceBackend()
    raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")


def engine_backend(config: EngineConfig, packed: PackedSlot | None = None) -> Backend:
    """The back-end that the settings ask for. Raises ConfigError."""
    return make_backend(config.backend, config.threads, packed, config.cuda)


def backend_memory(config: EngineConfig) -> Available:
    """The memory that the settings' back-end takes its own from, as of now: the machine's, or a card's.

    Raises ConfigError where there is no such card.
    """
    if config.backend != "cuda" or config.cuda.device == "cpu":
        return available_memory()
    from kvarn.backends.cuda import card_memory

    return Available(*card_memory(config.cuda.device))


def memory_elsewhere(config: EngineConfig, num_bytes: int) -> Available:
    """The memory that the settings' back-end would have of a machine, or a card, with so much of it, named --memory."""
    if config.backend != "cuda" or config.cuda.device == "cpu":
        return Available(num_bytes, "--memory")
    from kvarn.backends.cuda.libraries import CONTEXT_BYTES

    left = max(0, num_bytes - CONTEXT_BYTES)
    return Available(left, f"--memory without {size_text(CONTEXT_BYTES)} for CUDA's context, an estimate")
