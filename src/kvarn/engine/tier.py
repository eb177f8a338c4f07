"""The second tier of the KV cache: its file, what is in it, and what moving a block takes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from kvarn import _native
from kvarn.backends import Executable
from kvarn.cache import OffloadIndex
from kvarn.config import EngineConfig
from kvarn.errors import ConfigError
from kvarn.program import Program
from kvarn.runner import BlockFile, MoveSeconds, measure_move

FILE_NAME = "blocks.kv"


@dataclass(frozen=True, slots=True)
class Tier:
    """file: None where there is no tier. move_seconds: what saving and loading a block, of one KV group, takes here."""

    file: BlockFile | None
    identity: str
    move_seconds: MoveSeconds

    def new_index(self) -> OffloadIndex:
        """What is in the file now, as the prefix cache needs it."""
        if self.file is None:
            return OffloadIndex()
        return OffloadIndex(self.file.num_slots, self.identity, self.file.present())


def open_tier(config: EngineConfig, program: Program, executable: Executable, model: str) -> Tier:
    """Opens the file where the config has one, and measures it. model: what tells the model from all others.

    Raises ConfigError where the file cannot be had, or the model has no identity.
    """
    cache = config.cache
    if not cache.kv_offload_bytes:
        return Tier(None, "", MoveSeconds(0.0, 0.0))
    if not model:
        raise ConfigError("kv_offload_bytes: a model that was not read from files has no identity to keep KV under")
    identity = _identity(config, program, model)
    path = _folder(cache.kv_offload_dir) / FILE_NAME
    file = BlockFile(path, cache.kv_offload_bytes, executable.block_bytes, identity)
    return Tier(file, identity, measure_move(executable, file))


def _identity(config: EngineConfig, program: Program, model: str) -> str:
    """Changes with everything that a block's bits depend on beside its tokens: instruction set and build among it."""
    build = hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()
    isa = _native.available_isas()[0] if config.backend == "cpu" else "numpy"
    parts = (model, repr(program), config.backend, build, isa, config.cache.dtype, str(config.cache.block_size))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _folder(given: str | None) -> Path:
    if given is not None:
        return Path(given).expanduser()
    from kvarn.weights.catalog import cache_dir

    return cache_dir() / "kv"
