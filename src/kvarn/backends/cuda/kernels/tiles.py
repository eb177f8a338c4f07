"""Shapes of tiles, and the number of shares that K is cut into (split-K), by kind of product and size.

Fixed rules and no search at serve time, so the same product is always computed in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_K = 128
"""Inputs in a block of K; shares are whole blocks."""
GEMV_PROGRAMS = 512
"""With one row of activations at least this many programs, where K has enough blocks: on 132 multiprocessors some 30
warps each, all with loads under way."""
MAX_SHARES = 16
FP8_TOKENS = 16
"""Up to so many rows FP8 weights are multiplied by activations as they are: the weight's bytes take the time anyway."""
FP8_COLUMNS = 16
"""Rows of FP8 are filled up to a multiple of so many elements."""
ALIGNMENT = 256
"""Bytes; parts of a workspace start at multiples of it."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one product is cut.

    block_m, block_n: rows of activations and rows of the weight of a program. blocks: blocks of K that an iteration
    loads at once. shares: parts of K. warps, stages: Triton's.
    """

    block_m: int
    block_n: int
    blocks: int
    shares: int
    warps: int
    stages: int

    def share_blocks(self, width: int) -> int:
        """Blocks of K in a share: whole iterations. The last share may have fewer."""
        iterations = -(-width // (BLOCK_K * self.blocks))
        return -(-iterations // self.shares) * self.blocks


_INT4_GEMV = Tiles(1, 16, 8, 1, 8, 1)
_BYTES_GEMV = Tiles(1, 32, 4, 1, 8, 1)
_GEMM: tuple[tuple[int | None, Tiles, int], ...] = (
    (16, Tiles(16, 64, 1, 1, 4, 4), 256),
    (32, Tiles(32, 64, 1, 1, 4, 4), 256),
    (64, Tiles(64, 64, 1, 1, 4, 3), 128),
    (256, Tiles(64, 64, 1, 1, 4, 3), 1),
    (None, Tiles(128, 128, 1, 1, 8, 3), 1),
)
"""By the most rows of activations: tiles, and the programs that shares are to make up. Two for each multiprocessor;
with more rows fewer, as partial sums would soon be as many bytes as the weight. Large tiles only where they suffice."""


def int4_gemv_tiles(rows: int, width: int) -> Tiles:
    """One row of activations, four-bit weights."""
    return _split(_INT4_GEMV, -(-rows // _INT4_GEMV.block_n), width, GEMV_PROGRAMS, least=1)


def bytes_gemv_tiles(rows: int, width: int) -> Tiles:
    """One row of activations, weights of one byte or 16 bits."""
    return _split(_BYTES_GEMV, -(-rows // _BYTES_GEMV.block_n), width, GEMV_PROGRAMS, least=1)


def gemm_tiles(tokens: int, rows: int, width: int) -> Tiles:
    """Several rows of activations, on tensor cores."""
    tiles, wanted = next((tiles, wanted) for most, tiles, wanted in _GEMM if most is None or tokens <= most)
    return _split(tiles, -(-rows // tiles.block_n), width, wanted, least=4)


def product_workspace(kind: str, rows: int, width: int, tokens: int, *, fp8_products: bool) -> int:
    """Bytes that a product of `tokens` rows with an int4, int8 or fp8 weight needs beside its operands: partial sums of
    shares and, where both sides are multiplied as FP8, activations in that form. Not monotone in `tokens`."""
    if not tokens or kind == "dense":
        return 0
    if tokens > 1:
        tiles = gemm_tiles(tokens, rows, width)
    else:
        tiles = (int4_gemv_tiles if kind == "int4" else bytes_gemv_tiles)(rows, width)
    total = 0 if tiles.shares == 1 else aligned(4 * tiles.shares * tokens * rows)
    if kind == "fp8" and fp8_products and tokens > FP8_TOKENS:
        total += aligned(tokens * -(-width // FP8_COLUMNS) * FP8_COLUMNS) + aligned(4 * tokens)
    return total


def largest_workspace(kind: str, rows: int, width: int, tokens: int, *, fp8_products: bool = True) -> int:
    """The most that `product_workspace` says for 1 … tokens rows: within one kind of tile it grows with the rows."""
    steps = {min(step, tokens) for step in (1, 16, 32, 64, tokens)}
    return max(product_workspace(kind, rows, width, step, fp8_products=fp8_products) for step in steps)


def aligned(size: int) -> int:
    """Parts of a workspace start at multiples of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _split(tiles: Tiles, programs: int, width: int, wanted: int, least: int) -> Tiles:
    """Doubles shares up to `wanted` programs, while each has `least` iterations; none is empty."""
    iterations = -(-width // (BLOCK_K * tiles.blocks))
    shares = 1
    while shares < MAX_SHARES and programs * shares < wanted and iterations >= 2 * shares * least:
        shares *= 2
    shares = -(-iterations // -(-iterations // shares))
    return Tiles(tiles.block_m, tiles.block_n, tiles.blocks, shares, tiles.warps, tiles.stages)
