"""The seam between the runner and a back-end: `Backend.load -> Executable`, `Executable.execute(InputBatch)`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvarn.program import Program
from kvarn.tensors import DType, TensorSource


@dataclass(frozen=True, slots=True, eq=False)
class InputBatch:
    """The arrays of one step: T tokens of S sequences, ragged, R rows with logits. Passed, never ambient.

    token_ids, positions: int32[T]. slot_mapping: int64[T, G], block id * block_size + offset in the block, for each KV
    group of the program (`KvGroups`). query_start: int32[S+1], rows query_start[s] … query_start[s+1] belong to
    sequence s, in order of position. seq_lens: int32[S], tokens with KV after this step (so the last row of s is at
    position seq_lens[s] - 1). block_tables: int32[S, G, B], block ids by position, padded with -1; those that lie
    before the window of a group, as the sequence's first row sees it, may be anything and are not looked at.
    output_rows: int32[R], rows whose logits are needed, ascending.

    tree_parents: the last rows of a sequence may be a tree of draft tokens (Miao et al. 2024, SpecInfer). int32[T]: the
    row of a draft's parent, an earlier draft of its sequence or the sequence's last known token, which is in the step
    too; -1 for known tokens. None: no trees. A draft's position is its parent's + 1, and it reads the keys of all known
    tokens and of its ancestors, itself included. Positions repeat, slots do not: a sequence's rows are in consecutive
    ones of every KV group, so that draft i (from 0) has that of position (known tokens + i), and seq_lens counts drafts
    too. In a chain, where every parent is the row before, slots are those of the positions: that is the batch without
    `tree_parents`. In an int4 cache one draft of a tree at most may be at a multiple of 16.

    inputs: float32[T, width] for each buffer that the program's `Input` ops name; copied before the step.
    """

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    slot_mapping: NDArray[np.int64]
    query_start: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    output_rows: NDArray[np.int32]
    tree_parents: NDArray[np.int32] | None = None
    inputs: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @classmethod
    def of_one(
        cls, token_ids: ArrayLike, start: int = 0, *, num_outputs: int = 1, block_size: int = 16, num_groups: int = 1
    ) -> InputBatch:
        """A sequence that is alone: tokens from position `start` on, in the blocks 0, 1, 2, … (see `of_tables`).

        num_outputs: how many of the last tokens' logits are needed. For many sequences, and in the engine, see
        `kvarn.runner.BatchBuilder`.
        """
        ids = np.asarray(token_ids, np.int32)
        end = start + ids.size
        return cls.of_tables(
            token_ids=ids,
            positions=np.arange(start, end, dtype=np.int32),
            query_start=np.array([0, ids.size], np.int32),
            seq_lens=np.array([end], np.int32),
            tables=np.arange(-(-end // block_size), dtype=np.int32)[None, :],
            output_rows=np.arange(ids.size - num_outputs, ids.size, dtype=np.int32),
            block_size=block_size,
            num_groups=num_groups,
        )

    @classmethod
    def of_tables(
        cls,
        token_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        query_start: NDArray[np.int32],
        seq_lens: NDArray[np.int32],
        tables: NDArray[np.int32],
        output_rows: NDArray[np.int32],
        *,
        block_size: int,
        num_groups: int = 1,
    ) -> InputBatch:
        """The batch of sequences with a table each: block b of `tables`, int32[S, B], is block b * G + g of group g.

        So the cache must have G times as many blocks.
        """
        groups = np.arange(num_groups, dtype=np.int32)
        spread = np.where(tables[:, None, :] < 0, -1, tables[:, None, :] * num_groups + groups[:, None])
        owner = np.repeat(np.arange(seq_lens.size), np.diff(query_start))
        slots = spread[owner, :, positions // block_size].astype(np.int64) * block_size
        slots += (positions % block_size)[:, None]
        return cls(token_ids, positions, slots, query_start, seq_lens, spread.astype(np.int32), output_rows)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.token_ids.size)

    @property
    def num_sequences(self) -> int:
        """S."""
        return int(self.seq_lens.size)


@dataclass(frozen=True, slots=True)
class KvCacheSpec:
    """Size and type of the KV cache that a back-end allocates at load. block_size: tokens in a block.

    A block holds what one KV group of the program keeps of so many tokens."""

    num_blocks: int
    block_size: int = 16
    dtype: str = "float16"
    """One of `CACHE_TYPES`."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step an executable must be able to run; its activations are allocated for it at load."""

    max_num_tokens: int
    max_num_sequences: int
    max_model_len: int
    max_num_drafts: int = 0
    """Rows with logits that a step may have beside one for each sequence."""
    outputs: tuple[str, ...] = ()
    """Buffers that every step returns, asked for or not, beside the program's output."""

    @property
    def max_num_outputs(self) -> int:
        """Rows with logits in a step at most."""
        return min(self.max_num_tokens, self.max_num_sequences + self.max_num_drafts)


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """Bytes of something that only some back-ends have, and in words how they come about."""

    name: str
    num_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes an executable holds. `total` leaves out the interpreter and the mapped file."""

    weights: int
    """Matrices, tables and vectors, in the form that kernels read."""
    tables: int
    """Rotary tables, for every position up to max_model_len."""
    kv_cache: int
    activations: int
    """Buffers of the largest step, and the threads' working storage."""
    parts: tuple[MemoryPart, ...] = ()
    """What else there is, by name."""

    @property
    def without_cache(self) -> int:
        """What is held whatever the cache's size is."""
        return self.weights + self.tables + self.activations + sum(part.num_bytes for part in self.parts)

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.without_cache + self.kv_cache

    def plus(self, other: MemoryUse) -> MemoryUse:
        """What two of them hold."""
        return MemoryUse(
            self.weights + other.weights,
            self.tables + other.tables,
            self.kv_cache + other.kv_cache,
            self.activations + other.activations,
            (*self.parts, *other.parts),
        )


class Executable(Protocol):
    """A loaded program. Owns its packed weights, KV cache and activations. Not thread-safe: one caller at a time."""

    @property
    def program(self) -> Program:
        """What runs."""
        ...

    def execute(self, batch: InputBatch, outputs: Sequence[str] = ()) -> Mapping[str, NDArray[np.float32]]:
        """Runs one step; writes the KV of all T tokens.

        Returns the program's output buffer (logits, float32[R, vocab]), those of `StepLimits.outputs`, and every buffer
        named in `outputs`, by name.
        The arrays are valid until the next call. Raises ValueError where the batch exceeds the limits or names a
        slot, block or token out of range (nothing is run then).
        """
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole KV blocks (source, destination), in order."""
        ...

    def move_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies keys and values from slot to slot (source, destination), as if all at once.

        For the accepted path of a tree: each draft's slot and the one of its position, in each KV group, before the
        next step. What comes after has the bits then that it has without trees. Raises ValueError, before anything is
        copied, where a slot is out of range or two pairs have one destination.
        """
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block, as `read_block` gives them."""
        ...

    def read_block(self, block: int, out: NDArray[np.uint8]) -> None:
        """Copies a block's keys and values, of all layers of its group, to uint8[block_bytes]. Raises ValueError."""
        ...

    def write_block(self, block: int, data: NDArray[np.uint8]) -> None:
        """Sets a block to what `read_block` gave, for this program and this type of cache. Raises ValueError."""
        ...

    def commit(self) -> int:
        """Has the system back a piece of a few MB of the KV cache that nothing has used yet; returns the bytes left.

        Changes no value. A cache grows in memory as its blocks are first used; this does it before.
        """
        ...

    def close(self) -> None:
        """Releases threads and memory. Idempotent."""
        ...


class Backend(Protocol):
    """A way to run programs. Stateless: all state lives in the executables it loads."""

    name: str

    def memory_use(
        self,
        program: Program,
        dtypes: Mapping[str, DType],
        kv: KvCacheSpec,
        limits: StepLimits,
        *,
        shared: Collection[str] = (),
    ) -> MemoryUse:
        """What `load` will allocate, all of it; a step allocates nothing. dtypes: stored type of each weight by name.
        shared: see `load`. Reads no weight."""
        ...

    def load(
        self,
        program: Program,
        weights: TensorSource,
        kv: KvCacheSpec,
        limits: StepLimits,
        *,
        beside: Executable | None = None,
        shared: Collection[str] = (),
    ) -> Executable:
        """Reads and packs the weights, allocates cache and activations.

        beside: an executable of this back-end that never runs at the same time, such as that of the model which a small
        program belongs to: its threads are used, and nothing is kept on disk. shared: names of weights that are the
        same in both programs, and are held once.

        Raises UnsupportedModelError where an op, a tensor type or a shape is not supported, ConfigError where a setting
        is."""
        ...
