"""How attention is cut into programs, and the memory that it needs beside its operands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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

    *_rows: query rows of a tile; *_keys: keys of a tile; *_stages: Triton's depth of the pipeline. A tile's block ids are
    fetched before its keys, so that keys are (stages - 1) // 2 tiles ahead of the products.
    """

    long_rows: int
    long_keys: int
    long_stages: int
    short_rows: int
    short_keys: int
    short_stages: int
    warps: int


def tiles(block_dim: int, product: torch.dtype) -> Tiles:
    """For heads of so many elements (a power of two) and products in that type.

    Bounds are a Hopper multiprocessor's 227 KiB of shared memory and 64k registers. Warps are the same for both kinds of
    sequence, so that a decode is the same code in a batch with prompts and in one without.
    """
    if product == torch.float32:  # full float32 has no matrix units: tiles that stay in registers
        keys = 32 if block_dim <= 128 else 16
        return Tiles(16, keys, 1, 16, keys, 1, warps=4)
    if block_dim <= 64:
        return Tiles(128, 64, 5, 16, 64, 7, warps=4)
    if block_dim <= 128:
        return Tiles(128, 64, 5, 16, 64, 7, warps=8)
    if block_dim <= 256:
        return Tiles(128, 64, 3, 16, 64, 5, warps=8)
    return Tiles(16, 32, 3, 16, 32, 3, warps=8)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The size of a launch's grid, for all steps of a bucket: what a CUDA graph fixes. No result depends on it.

    sequences, tokens: those of the step or more; the rest are sequences without rows. short_rows: the most rows of a
    sequence that has at most `SHORT_QUERIES`; 0 where there is none. long: whether sequences with more rows may be in
    it. A launch over decodes alone, or over prefill alone, is a smaller program than one for both. programs: what a
    launch over splits aims at.
    """

    sequences: int
    tokens: int
    short_rows: int
    long: bool
    programs: int = PROGRAMS

    def __post_init__(self) -> None:
        if not 0 <= self.short_rows <= SHORT_QUERIES or not (self.short_rows or self.long):
            raise ValueError(f"short_rows must be 1 to {SHORT_QUERIES}, or 0 with long sequences alone")

    @classmethod
    def of(cls, query_start: NDArray[np.int32]) -> AttentionPlan:
        """The least one that a step needs (see `InputBatch.query_start`)."""
        counts = np.diff(query_start)
        short = counts[counts <= SHORT_QUERIES]
        return cls(counts.size, int(query_start[-1]), int(short.max(initial=0)), bool(counts.max() > SHORT_QUERIES))

    @classmethod
    def decode(cls, sequences: int, rows: int = 1) -> AttentionPlan:
        """Sequences with at most `rows` rows each, the last token and its drafts."""
        return cls(sequences, sequences * rows, rows, long=False)

    def long_programs(self, group: int, tile_rows: int) -> int:
        """Tiles that cover the rows of long sequences, for each KV head, whatever their lengths are."""
        return self.tokens * group // tile_rows + self.sequences if self.long else 0

    def short_tiles(self, group: int, tile_rows: int) -> int:
        """Tiles of a short sequence's rows."""
        return -(-self.short_rows * group // tile_rows)

    def split_programs(self, kv_heads: int, tiles: int) -> int:
        """Programs that share the splits of a short sequence, for each KV head and tile of rows."""
        wanted = -(-self.programs // (self.sequences * kv_heads * max(1, tiles)))
        return min(PARTIALS, max(FEWEST_PROGRAMS, wanted))


@dataclass(frozen=True, slots=True, eq=False)
class AttentionWorkspace:
    """Partial results of splits. One serves all layers: what is in it is of no use after a call.

    mixed: float32, room for [sequences, heads, PARTIALS, value_dim]; stats: for [sequences, heads, PARTIALS, 2].
    """

    mixed: Tensor
    stats: Tensor

    @staticmethod
    def sizes(sequences: int, heads: int, value_dim: int, max_model_len: int) -> tuple[int, int]:
        """Elements of `mixed` and of `stats`: none where no sequence can be long enough to be split."""
        rows = sequences * heads * PARTIALS if max_model_len > MIN_SPLIT else 0
        return rows * value_dim, rows * 2

    @classmethod
    def bytes(cls, sequences: int, heads: int, value_dim: int, max_model_len: int) -> int:
        """What `empty` allocates. heads, value_dim: of the layer where their product is largest."""
        return 4 * sum(cls.sizes(sequences, heads, value_dim, max_model_len))

    @classmethod
    def empty(cls, sequences: int, heads: int, value_dim: int, max_model_len: int, device: str) -> AttentionWorkspace:
        """For steps of at most so many sequences, of at most max_model_len tokens each."""
        mixed, stats = (
            torch.empty(size, dtype=torch.float32, device=device)
            for size in cls.sizes(sequences, heads, value_dim, max_model_len)
        )
        return cls(mixed, stats)
