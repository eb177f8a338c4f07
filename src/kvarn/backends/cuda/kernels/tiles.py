"""Shapes of tiles and numbers of shares (split-K) by form, rows of activations and size of the weight.

Fixed rules, no search at serve time: the same product always runs in the same order. `bench/gpu.py` may pass others.
"""

from __future__ import annotations

from dataclasses import dataclass

GEMV_PROGRAMS = 512
"""A product with one row of activations is cut into at least this many programs, if shares of K allow it: a card of 132
multiprocessors then has some 15 warps on each, all with loads in flight."""
SKINNY_PROGRAMS = 264
MAX_SHARES = 16
SKINNY = 16
"""Up to so many rows of activations a product is bound by the weight's bytes, and its tile has 16 rows."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """block_n: output rows of a program. block_m: rows of activations of a program (1: GEMV). block_k: inputs of one
    iteration. shares: parts that K is cut into. warps, stages: as Triton has them."""

    block_m: int
    block_n: int
    block_k: int
    shares: int
    warps: int
    stages: int


def gemv_tiles(rows: int, width: int, block_k: int) -> Tiles:
    """For one row of activations. block_k: weights of a row that one iteration of a program takes, by form."""
    block_n = 8 if rows >= 2048 else 4
    return Tiles(1, block_n, block_k, _shares(-(-rows // block_n), width, block_k, GEMV_PROGRAMS), 4, 1)


def gemm_tiles(tokens: int, rows: int, width: int, block_k: int) -> Tiles:
    """For several rows of activations, multiplied by tensor cores."""
    if tokens <= SKINNY:
        return Tiles(16, 64, block_k, _shares(-(-rows // 64), width, 2 * block_k, SKINNY_PROGRAMS), 4, 4)
    if tokens <= 32:
        return Tiles(32, 64, block_k, _shares(-(-rows // 64), width, 4 * block_k, SKINNY_PROGRAMS), 4, 4)
    if tokens <= 64:
        return Tiles(64, 64, block_k, _shares(-(-rows // 64), width, 4 * block_k, SKINNY_PROGRAMS), 4, 3)
    return Tiles(128, 128, block_k, 1, 8, 3)


def _shares(programs: int, width: int, least: int, wanted: int) -> int:
    """The power of two that brings `programs` up to `wanted`, while each share has `least` inputs or more."""
    shares = 1
    while shares < MAX_SHARES and programs * shares < wanted and width >= 2 * shares * least:
        shares *= 2
    return shares


def share_blocks(width: int, tiles: Tiles) -> int:
    """Blocks of `block_k` inputs in each share but perhaps the last ones; every share starts at a whole block."""
    return -(-(-(-width // tiles.block_k)) // tiles.shares)
