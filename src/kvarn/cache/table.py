"""`BlockTable`: the blocks of one sequence in order of position, with sharing and copy-on-write."""

from __future__ import annotations

from collections.abc import Sequence

from kvarn.cache.pool import BlockPool


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


class BlockTable:
    """Blocks of positions 0 … of one sequence. Holds one reference on each until `release`.

    A block may be shared with other tables. What is shared is never written: `prepare_write` replaces it first.
    """

    def __init__(self, pool: BlockPool) -> None:
        """An empty table of blocks from `pool`."""
        self._pool = pool
        self._blocks: list[int] = []
        self._ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> int:
        return self._blocks[index]

    @property
    def ids(self) -> tuple[int, ...]:
        """The blocks by position: the same tuple object until the table changes."""
        if len(self._ids) != len(self._blocks):
            self._ids = tuple(self._blocks)
        return self._ids

    def blocks_needed(self, start: int, end: int) -> int:
        """Free blocks that `prepare_write(start, end)` would take."""
        growth = blocks_for(end, self._pool.block_size) - len(self._blocks)
        return max(growth, 0) + self._shared_at(start)

    def prepare_write(self, start: int, end: int) -> list[tuple[int, int]]:
        """Makes positions start … end - 1 writable by this table alone.

        Returns the (source, destination) blocks to copy before the write: at most one, since only the block that
        holds `start` can be both shared and partly filled. Raises OutOfBlocksError where `blocks_needed` exceeds what
        is free.
        """
        copies: list[tuple[int, int]] = []
        if self._shared_at(start):
            index, offset = divmod(start, self._pool.block_size)
            source, (copy,) = self._blocks[index], self._pool.allocate(1)
            self._pool.free((source,))
            self._blocks[index] = copy
            self._ids = ()
            if offset:
                copies.append((source, copy))
        growth = blocks_for(end, self._pool.block_size) - len(self._blocks)
        if growth > 0:
            self._blocks += self._pool.allocate(growth)
        return copies

    def fork(self, num_tokens: int) -> BlockTable:
        """A table that shares the blocks of the first `num_tokens` tokens."""
        child = BlockTable(self._pool)
        child.adopt(self._blocks[: blocks_for(num_tokens, self._pool.block_size)])
        return child

    def adopt(self, blocks: Sequence[int]) -> None:
        """Appends blocks that somebody else holds, sharing them."""
        self._pool.share(blocks)
        self._blocks += blocks
        self._ids = ()

    def replace(self, index: int, block: int) -> None:
        """Shares a block that somebody else holds in place of the one at `index`, which is given back."""
        self._pool.share((block,))
        self._pool.free((self._blocks[index],))
        self._blocks[index] = block
        self._ids = ()

    def truncate(self, num_blocks: int) -> None:
        """Gives all but the first `num_blocks` blocks back."""
        # In reverse, so that the free list hands them out in order of position again (see BlockPool for idle ones).
        self._pool.free(reversed(self._blocks[num_blocks:]))
        del self._blocks[num_blocks:]
        self._ids = ()

    def release(self) -> None:
        """Gives all blocks back and leaves the table empty."""
        self.truncate(0)

    def _shared_at(self, position: int) -> bool:
        index = position // self._pool.block_size
        return index < len(self._blocks) and self._pool.references(self._blocks[index]) > 1
