"""How long sequences may be and how many KV blocks there are: decided, and refused, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from kvarn.cache import blocks_for
from kvarn.config import CacheConfig, EngineConfig
from kvarn.errors import CapacityError, ConfigError
from kvarn.kv_types import KV_TYPES
from kvarn.program import Program

DEFAULT_CACHE_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine is loaded with. cache_bytes: all blocks of all layers."""

    max_model_len: int
    num_blocks: int
    cache_bytes: int


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that a model takes whatever the cache's size is."""

    weights: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations


def block_bytes(program: Program, cache: CacheConfig) -> int:
    """Bytes of one block over all layers."""
    return program.kv_bytes_per_token(KV_TYPES[cache.dtype]) * cache.block_size


def plan_capacity(program: Program, config: EngineConfig, needs: Needs, available: int) -> Capacity:
    """Sizes the cache within `available` bytes of memory, of which the engine takes its share.

    Where neither blocks nor bytes are given, there is room for as many of the longest sequences as may run at once,
    but no more than 4 GiB (or one sequence), and no more than fits. Where max_model_len is not given it is what the
    model was made for, or what the cache holds. Raises CapacityError with the numbers and the nearest setting that
    fits, ConfigError where max_model_len exceeds what the model was made for.
    """
    cache = config.cache
    limit = program.max_positions
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len must be at most {limit}, what the model was made for, not {config.max_model_len}"
        )
    per_block = block_bytes(program, cache)
    budget = int(available * cache.memory_utilization) - needs.total
    fitting = max(0, budget // per_block)
    if fitting == 0:
        raise CapacityError(
            f"the model takes {_size(needs.weights)} of weights and {_size(needs.activations)} of activations, and a "
            f"block of KV cache {_size(per_block)}, but only {_size(int(available * cache.memory_utilization))} may be "
            f"used: {_size(available)} are available and memory_utilization is {cache.memory_utilization:g}"
        )
    wanted = config.max_model_len or limit
    num_blocks = _num_blocks(config, wanted, per_block, fitting)
    holds = num_blocks * cache.block_size
    if config.max_model_len is not None and config.max_model_len > holds:
        needed = blocks_for(wanted, cache.block_size)
        raise CapacityError(
            f"max_model_len {wanted} needs {needed} blocks of KV cache ({_size(needed * per_block)}), but there is "
            f"room for {num_blocks} ({_size(num_blocks * per_block)}); it may be at most {holds}"
        )
    return Capacity(min(wanted, holds), num_blocks, num_blocks * per_block)


def _num_blocks(config: EngineConfig, max_model_len: int, per_block: int, fitting: int) -> int:
    cache = config.cache
    if cache.num_blocks is None and cache.kv_cache_bytes is None:
        longest = blocks_for(max_model_len, cache.block_size)
        modest = max(longest, DEFAULT_CACHE_BYTES // per_block)
        return min(fitting, modest, longest * config.scheduler.max_num_seqs)
    if cache.num_blocks is not None:
        name, asked, num_blocks = "num_blocks", cache.num_blocks, cache.num_blocks
    else:
        assert cache.kv_cache_bytes is not None
        name, asked, num_blocks = "kv_cache_bytes", cache.kv_cache_bytes, cache.kv_cache_bytes // per_block
    if num_blocks == 0:
        raise CapacityError(f"kv_cache_bytes {asked} is less than one block; it must be at least {per_block}")
    if num_blocks > fitting:
        most = fitting if name == "num_blocks" else fitting * per_block
        raise CapacityError(
            f"{name} {asked} makes a KV cache of {_size(num_blocks * per_block)}, but {_size(fitting * per_block)} fit "
            f"beside the weights; {name} may be at most {most}"
        )
    return num_blocks


def _size(num_bytes: int) -> str:
    """Bytes for people: 1.25 GiB."""
    if num_bytes < 1 << 20:
        return f"{num_bytes / 1024:.1f} KiB"
    return f"{num_bytes / (1 << 20):.1f} MiB" if num_bytes < 1 << 30 else f"{num_bytes / (1 << 30):.2f} GiB"
