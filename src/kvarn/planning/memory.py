"""The plan before the load: what an engine will take, how long sequences may be, how many KV blocks there are.

One computation for whoever asks: `kvarn plan` prints it, the engine loads by it, and what does not fit is refused here,
before any weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kvarn.backends import KvCacheSpec, MemoryUse, StepLimits
from kvarn.cache import Windows, blocks_for
from kvarn.config import EngineConfig
from kvarn.errors import CapacityError, ConfigError
from kvarn.planning.available import Available
from kvarn.planning.sizes import size_text
from kvarn.program import Program

DEFAULT_CACHE_BYTES = 4 << 30
OFFLOAD_ENTRY_BYTES = 256
"""Memory for what is known of a block in the second tier; 150 to 170 were measured."""

Uses = Callable[[KvCacheSpec, StepLimits], MemoryUse]
"""What a back-end takes for a model with such a cache and such steps: `Backend.memory_use` of that model."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What an engine takes when it is loaded, all of it allocated then. Bytes unless said otherwise."""

    use: MemoryUse
    num_blocks: int
    block_size: int
    """Tokens in a block."""
    kv_dtype: str
    max_model_len: int
    """Tokens of the longest sequence."""
    max_num_seqs: int
    max_num_batched_tokens: int
    available: Available
    memory_utilization: float
    max_step_drafts: int = 0
    """Tokens that may be guessed ahead in a step: their logits are held."""
    offload_bytes: int = 0
    """Of the second tier's file: on disk, not in memory."""
    offload_index: int = 0
    """Memory for what is known of that file's blocks."""
    windows: tuple[int | None, ...] = (None,)
    """Of the KV groups: each block is one group's."""
    drafter: MemoryUse | None = None
    """Of a draft model, with a KV cache of as many blocks; None: there is none."""
    outputs: tuple[str, ...] = ()
    """Buffers that every step returns, for embeddings."""

    @property
    def total(self) -> int:
        """All that is taken of the memory."""
        return self.use.total + self.offload_index + (self.drafter.total if self.drafter else 0)

    @property
    def budget(self) -> int:
        """What may be taken of the available memory."""
        return int(self.available.num_bytes * self.memory_utilization)

    @property
    def cache_tokens(self) -> int:
        """Tokens that all blocks hold; where layers have windows, in sequences of max_model_len."""
        if self.groups.endless:
            return self.num_blocks // len(self.windows) * self.block_size
        return self.full_sequences * self.max_model_len

    @property
    def groups(self) -> Windows:
        """What the KV groups see."""
        return Windows(self.block_size, self.windows)

    @property
    def full_sequences(self) -> int:
        """How many sequences of max_model_len tokens fit the cache together, one of them with a prompt to compute."""
        alone, each = sequence_blocks(self.groups, self.max_model_len, self.max_num_batched_tokens)
        return 0 if self.num_blocks < alone else 1 + (self.num_blocks - alone) // each

    @property
    def kv(self) -> KvCacheSpec:
        """The cache as a back-end wants it."""
        return KvCacheSpec(self.num_blocks, self.block_size, self.kv_dtype)

    @property
    def limits(self) -> StepLimits:
        """The largest step, as a back-end wants it."""
        return StepLimits(
            self.max_num_batched_tokens, self.max_num_seqs, self.max_model_len, self.max_step_drafts, self.outputs
        )


def sequence_blocks(groups: Windows, length: int, chunk: int) -> tuple[int, int]:
    """Blocks that a sequence of `length` tokens holds at most: while its prompt is computed, `chunk` tokens a step, and
    then. The scheduler counts by the same function."""
    return groups.most_blocks(length, chunk), groups.most_blocks(length, 1)


def plan_memory(
    program: Program, uses: Uses, config: EngineConfig, available: Available, drafter: Uses | None = None
) -> MemoryPlan:
    """Sizes the cache within the available memory, of which the engine takes its share.

    Where neither blocks nor bytes are given, there is room for as many of the longest sequences as may run at once,
    but no more than fits, and in a machine's own memory no more than 4 GiB (or one sequence). Where max_model_len is
    not given it is what the model was made for, or the longest that fits. Raises CapacityError with the numbers and the
    nearest setting that fits, ConfigError where max_model_len exceeds what the model was made for.

    drafter: of a draft model beside it, whose cache has as many blocks; None: there is none.
    """
    limit = program.max_positions
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len must be at most {limit}, what the model was made for, not {config.max_model_len}"
        )
    return _Planner(program, uses, config, available, drafter).plan()


class _Planner:
    def __init__(
        self, program: Program, uses: Uses, config: EngineConfig, available: Available, drafter: Uses | None
    ) -> None:
        self._program = program
        self._uses = uses
        self._drafter = drafter
        self._config = config
        self._available = available
        self._block_size = config.cache.block_size
        self._groups = Windows(self._block_size, program.kv_groups.windows)
        self._chunk = config.scheduler.max_num_batched_tokens
        self._budget = int(available.num_bytes * config.cache.memory_utilization)
        self._known: dict[StepLimits, MemoryUse] = {}
        # What the back-end takes for a block: it may keep a type in more bytes than the type has.
        limits = self._limits(config.max_model_len or program.max_positions)
        self._block_bytes = self._taken(1, limits).kv_cache
        own = self._uses(self._kv(1), limits).kv_cache
        self._offload_index = config.cache.kv_offload_bytes // own * OFFLOAD_ENTRY_BYTES

    def plan(self) -> MemoryPlan:
        config = self._config
        length = config.max_model_len or self._program.max_positions
        if self._fitting(length) < self._needed(1) or config.max_model_len is None:
            length = self._longest(length, _MANY)
        asked = self._asked_blocks(length)
        num_blocks = self._default_blocks(length) if asked is None else asked
        wanted = config.max_model_len
        if wanted is not None and (wanted > length or self._needed(wanted) > num_blocks):
            raise self._too_long(wanted, asked)
        length = self._longest(length, num_blocks)
        kv, limits = self._kv(num_blocks), self._limits(length)
        steps = config.scheduler
        return MemoryPlan(
            use=self._uses(kv, limits),
            drafter=None if self._drafter is None else self._drafter(kv, limits),
            num_blocks=num_blocks,
            block_size=self._block_size,
            kv_dtype=config.cache.dtype,
            max_model_len=length,
            max_num_seqs=steps.max_num_seqs,
            max_num_batched_tokens=steps.max_num_batched_tokens,
            available=self._available,
            memory_utilization=config.cache.memory_utilization,
            max_step_drafts=config.max_step_drafts,
            offload_bytes=config.cache.kv_offload_bytes,
            offload_index=self._offload_index,
            windows=self._groups.sizes,
            outputs=limits.outputs,
        )

    def _needed(self, length: int) -> int:
        """Blocks that a sequence of `length` tokens takes."""
        return self._groups.most_blocks(length, self._chunk)

    def _limits(self, length: int, tokens: int | None = None) -> StepLimits:
        steps, drafts = self._config.scheduler, self._config.max_step_drafts
        outputs = (self._program.last_layer,)
        return StepLimits(tokens or steps.max_num_batched_tokens, steps.max_num_seqs, length, drafts, outputs)

    def _kv(self, num_blocks: int) -> KvCacheSpec:
        return KvCacheSpec(num_blocks, self._block_size, self._config.cache.dtype)

    def _taken(self, num_blocks: int, limits: StepLimits) -> MemoryUse:
        """By the model and a draft model together."""
        kv = self._kv(num_blocks)
        use = self._uses(kv, limits)
        return use if self._drafter is None else use.plus(self._drafter(kv, limits))

    def _fixed(self, length: int, tokens: int | None = None) -> MemoryUse:
        """What is taken beside the cache; its `kv_cache` is of one block."""
        limits = self._limits(length, tokens)
        if limits not in self._known:
            self._known[limits] = self._taken(1, limits)
        return self._known[limits]

    def _fitting(self, length: int, tokens: int | None = None) -> int:
        """Blocks that fit beside weights, tables and activations where sequences have up to `length` tokens."""
        taken = self._fixed(length, tokens).without_cache + self._offload_index
        return max(0, self._budget - taken) // self._block_bytes

    def _longest(self, length: int, num_blocks: int) -> int:
        """The longest up to `length` that `num_blocks` hold, and that fits: longer sequences need larger tables.

        Raises CapacityError where not even one block fits.
        """

        def fits(blocks: int) -> bool:
            tokens = min(length, blocks * self._block_size)
            return self._needed(tokens) <= min(num_blocks, self._fitting(tokens))

        low, high = 0, blocks_for(length, self._block_size)
        if fits(high):
            return length
        while low < high:
            middle = (low + high + 1) // 2
            if fits(middle):
                low = middle
            else:
                high = middle - 1
        if low == 0:
            raise self._nothing_fits()
        return min(length, low * self._block_size)

    def _default_blocks(self, length: int) -> int:
        alone, each = sequence_blocks(self._groups, length, self._chunk)
        wanted = min(self._fitting(length), alone + each * (self._config.scheduler.max_num_seqs - 1))
        if self._config.backend == "cuda":  # nobody else makes use of a card's memory meanwhile
            return wanted
        return min(wanted, max(alone, DEFAULT_CACHE_BYTES // self._block_bytes))

    def _asked_blocks(self, length: int) -> int | None:
        """The number of blocks that the settings ask for. Raises CapacityError where it does not fit."""
        cache, per_block = self._config.cache, self._block_bytes
        if cache.num_blocks is not None:
            name, asked, num_blocks = "num_blocks", cache.num_blocks, cache.num_blocks
        elif cache.kv_cache_bytes is not None:
            name, asked, num_blocks = "kv_cache_bytes", cache.kv_cache_bytes, cache.kv_cache_bytes // per_block
        else:
            return None
        least = self._needed(1)
        if num_blocks < least:
            each = "one block" if least == 1 else f"a block for each of {least} groups of layers"
            must = least if name == "num_blocks" else least * per_block
            raise CapacityError(f"{name} {asked} is less than {each}; it must be at least {must}")
        if self._config.max_model_len is None:
            length = min(length, self._groups.longest(num_blocks, self._chunk, length))
        fitting = self._fitting(length)
        if num_blocks > fitting:
            most = fitting if name == "num_blocks" else fitting * per_block
            raise CapacityError(
                f"{name} {asked} makes a KV cache of {size_text(num_blocks * per_block)}, but "
                f"{size_text(fitting * per_block)} fit beside the weights; {name} may be at most {most} "
                f"({self._allowed()})"
            )
        return num_blocks

    def _too_long(self, wanted: int, asked: int | None) -> CapacityError:
        needed = self._needed(wanted)
        fits = self._longest(wanted, asked or _MANY)
        num_blocks = asked or self._fitting(fits)
        return CapacityError(
            f"max_model_len {wanted} needs {needed} blocks of KV cache ({size_text(needed * self._block_bytes)}), but "
            f"there is room for {num_blocks} ({size_text(num_blocks * self._block_bytes)}); it may be at most "
            f"{fits} ({self._allowed()})"
        )

    def _nothing_fits(self) -> CapacityError:
        use, least = self._fixed(self._block_size), self._needed(1) * self._block_bytes
        index = f"kv_offload_bytes {size_text(self._offload_index)}, " if self._offload_index else ""
        return CapacityError(
            f"the model takes {size_text(use.weights + use.tables)} of weights and {size_text(use.activations)} of "
            f"activations, {index}and a block of KV cache {size_text(least)}, but only "
            f"{size_text(self._budget)} may be used: {self._allowed()}; "
            f"{self._nearest(use.without_cache + self._offload_index + least)}"
        )

    def _nearest(self, needed: int) -> str:
        """What to change, least first: the share of memory, the size of a step, the memory itself."""
        share = math.ceil(1000 * needed / max(1, self._available.num_bytes)) / 1000
        if share <= 1:
            return f"memory_utilization must be at least {share:g}"
        steps = self._config.scheduler
        tokens = steps.max_num_batched_tokens // 2
        while tokens >= steps.max_num_seqs:
            if self._fitting(self._block_size, tokens) >= self._needed(1):
                return f"max_num_batched_tokens may be at most {tokens}"
            tokens //= 2
        needed_here = math.ceil(needed / self._config.cache.memory_utilization)
        return f"at least {size_text(needed_here)} must be available"

    def _allowed(self) -> str:
        share = self._config.cache.memory_utilization
        return (
            f"{size_text(self._available.num_bytes)} are available ({self._available.source}), memory_utilization is "
            f"{share:g}"
        )


_MANY = 1 << 60
