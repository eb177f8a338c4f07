"""How attention is cut into programs, and the memory that it needs beside its operands. Plain numbers, no torch."""

from __future__ import annotations

from dataclasses import dataclass

SHORT_QUERIES = 16
"""A sequence with at most so many rows in a step has its keys split among programs; longer ones are cut by rows."""
PARTIALS = 32
"""Partial results of a short sequence and query head: its splits times its rows are at most so many."""
MIN_SPLIT = 256
"""Keys in a split at least."""
PROGRAMS = 1024
"""Programs that a launch over splits aims at: several for each multiprocessor of the cards that there are."""
FEWEST_PROGRAMS = 4
"""For a sequence's splits at least, so that a long one among many short ones is not walked by one program alone."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes of a launch, fixed by shape and type: never by the batch, on which no row's result may depend.

    *_rows: query rows of a tile; *_keys: keys of a tile; *_stages: Triton's depth of the pipeline. A tile's block ids
    are fetched before its keys, so that keys are (stages - 1) // 2 tiles ahead of the products. short_registers: a
    thread's at most where there are splits alone, so that two programs share a multiprocessor: one computes while the
    other waits for its first keys.
    """

    long_rows: int
    long_keys: int
    long_stages: int
    short_rows: int
    short_keys: int
    short_stages: int
    warps: int
    short_registers: int | None = None


def tiles(block_dim: int, *, float32: bool) -> Tiles:
    """For heads of so many elements (a power of two), multiplied in float32 or in 16 bits.

    Bounds are a Hopper multiprocessor's 227 KiB of shared memory and 64k registers. Warps are the same for both kinds
    of sequence, so that a decode is the same code in a batch with prompts and in one without.
    """
    if float32:  # full float32 has no matrix units: tiles that stay in registers
        keys = 32 if block_dim <= 128 else 16
        return Tiles(16, keys, 1, 16, keys, 1, warps=4)
    if block_dim <= 64:
        return Tiles(128, 64, 5, 16, 64, 7, warps=4)
    if block_dim <= 128:
        return Tiles(128, 64, 5, 16, 64, 7, warps=8, short_registers=128)
    if block_dim <= 256:
        return Tiles(128, 64, 3, 16, 64, 5, warps=8)
    return Tiles(16, 32, 3, 16, 32, 3, warps=8)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The size of a launch's grid, for all steps of a bucket: what a CUDA graph fixes. No result depends on it.

    sequences, tokens: as many as the arrays are laid out for; those beyond the step's have no rows. max_query: the
    most rows of a sequence, or more; what it is up to `SHORT_QUERIES` is only a matter of speed. programs: what a
    launch over splits aims at.
    """

    sequences: int
    tokens: int
    max_query: int
    programs: int = PROGRAMS

    @property
    def long(self) -> bool:
        """Whether there may be long sequences. A launch without them is a smaller program."""
        return self.max_query > SHORT_QUERIES

    @property
    def short_rows(self) -> int:
        """Rows of a short sequence that have programs of their own; beside a prompt it is hardly ever more than one."""
        return 1 if self.long else self.max_query

    def long_items(self, group: int, tile_rows: int) -> int:
        """Tiles that cover the rows of long sequences, for each KV head, whatever their lengths are."""
        return self.tokens * group // tile_rows + self.sequences if self.long else 0

    def short_tiles(self, group: int, tile_rows: int) -> int:
        """Tiles of a short sequence's rows that have programs of their own."""
        return -(-self.short_rows * group // tile_rows)

    def split_programs(self, kv_heads: int, tiles: int) -> int:
        """Programs that share the splits of a short sequence, for each KV head and tile of rows."""
        wanted = -(-self.programs // (self.sequences * kv_heads * tiles))
        return min(PARTIALS, max(FEWEST_PROGRAMS, wanted))


def workspace_elements(sequences: int, heads: int, value_dim: int, max_model_len: int) -> tuple[int, int]:
    """Elements of `AttentionWorkspace.mixed` and `.stats`, for steps of at most so many sequences of so many tokens.

    heads, value_dim: the most of any layer. None where no sequence is long enough to be split.
    """
    partials = sequences * heads * PARTIALS if max_model_len > MIN_SPLIT else 0
    return partials * value_dim, partials * 2
