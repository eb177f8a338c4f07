"""`BlockTable`: the blocks of one sequence in order of position, with sharing and copy-on-write, by KV group."""

from __future__ import annotations

from collections.abc import Sequence

from kvarn.cache.pool import BlockPool
from kvarn.cache.windows import blocks_for

HOLE = -1
"""In place of a block that no token will see again."""
Column = Sequence[int]
"""The blocks of one index, one for each KV group; `HOLE` where there is none."""


class BlockTable:
    """Blocks of positions 0 … of one sequence in one KV group. Holds one reference on each until `release`.

    A block may be shared with other tables. What is shared is never written: `prepare_write` replaces it first. Where
    the group has a window, the table has holes before it; the blocks that were there are given back (`slide`).
    """

    def __init__(self, pool: BlockPool, group: int = 0) -> None:
        """An empty table of blocks from `pool`, for one of its groups."""
        self.num_holes = 0
        """All of them come first."""
        self._pool = pool
        self._group = group
        self._window = pool.windows.sizes[group]
        self._blocks: list[int] = []
        self._ids: tuple[tuple[int, ...]] = ((),)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> int:
        return self._blocks[index]

    @property
    def ids(self) -> tuple[tuple[int, ...], ...]:
        """By group, of which it is one, the blocks by position: the same tuple object until the table changes."""
        if len(self._ids[0]) != len(self._blocks):
            self._ids = (tuple(self._blocks),)
        return self._ids

    @property
    def by_group(self) -> Sequence[BlockTable]:
        """Itself."""
        return (self,)

    @property
    def held(self) -> Sequence[int]:
        """The blocks without the holes."""
        return self._blocks[self.num_holes :]

    @property
    def num_held(self) -> int:
        """Their number."""
        return len(self._blocks) - self.num_holes

    def column(self, index: int) -> list[int]:
        """The blocks at an index, by group."""
        return [self._blocks[index]]

    def blocks_needed(self, start: int, end: int) -> int:
        """Free blocks that `prepare_write(start, end)` would take."""
        growth = blocks_for(end, self._pool.block_size) - len(self._blocks)
        return max(growth, 0) + self._shared_at(start)

    def blocks_to_reach(self, start: int, end: int, chunk: int) -> int:
        """Most free blocks that it ever takes to write from `start` to `end`, at most `chunk` tokens a step."""
        needed = self.blocks_needed(start, end)
        most = None if self._window is None else self._pool.windows.most_in_group(self._group, chunk)
        if most is None:
            return needed
        shared = self._shared_at(start)
        return min(needed - shared, max(0, most - self.num_held)) + shared

    def sees(self, position: int) -> bool:
        """Whether the blocks are there that a token at `position` sees, of those before it."""
        return self.num_holes <= self._pool.windows.first(self._group, position)

    def prepare_write(self, start: int, end: int) -> list[tuple[int, int]]:
        """Makes positions start … end - 1 writable by this table alone.

        Returns the (source, destination) blocks to copy before the write: at most one of a group, since only the block
        that holds `start` can be both shared and partly filled. Raises OutOfBlocksError where `blocks_needed` exceeds
        what is free.
        """
        copies: list[tuple[int, int]] = []
        if self._shared_at(start):
            index, offset = divmod(start, self._pool.block_size)
            source, (copy,) = self._blocks[index], self._pool.allocate(1)
            self._pool.free((source,))
            self._blocks[index] = copy
            self._ids = ((),)
            if offset:
                copies.append((source, copy))
        growth = blocks_for(end, self._pool.block_size) - len(self._blocks)
        if growth > 0:
            self._blocks += self._pool.allocate(growth)
        return copies

    def fork(self, num_tokens: int) -> BlockTable:
        """A table that shares the blocks of the first `num_tokens` tokens."""
        child = BlockTable(self._pool, self._group)
        child._append(self._blocks[: blocks_for(num_tokens, self._pool.block_size)], self.num_holes)
        return child

    def adopt(self, columns: Sequence[Column], num_tokens: int) -> None:
        """Appends blocks that somebody else holds, for `num_tokens` tokens in all; shares what the next one sees."""
        first = self._pool.windows.first(self._group, num_tokens)
        self._append([column[self._group] for column in columns], first)

    def replace(self, index: int, column: Column) -> None:
        """Shares a block that somebody else holds in place of the one at `index`, which is given back."""
        block = column[self._group]
        if block != self._blocks[index]:
            self._pool.share((block,))
            self._pool.free((self._blocks[index],))
            self._blocks[index] = block
            self._ids = ((),)

    def slide(self, num_tokens: int) -> None:
        """Gives back what no token after the first `num_tokens` will see, nor the last of these.

        So the sequence may go on from that last token again, not from one before it.
        """
        if self._window is not None:
            first = self._pool.windows.first(self._group, num_tokens - 1)
            if first > self.num_holes:
                self._make_holes(len(self._blocks), first)

    def truncate(self, num_blocks: int) -> None:
        """Gives all but the first `num_blocks` blocks back."""
        # In reverse, so that the free list hands them out in order of position again (see BlockPool for idle ones).
        self._pool.free(reversed(self._blocks[max(num_blocks, self.num_holes) :]))
        del self._blocks[num_blocks:]
        self.num_holes = min(self.num_holes, num_blocks)
        self._ids = ((),)

    def release(self) -> None:
        """Gives all blocks back and leaves the table empty."""
        self.truncate(0)

    def _append(self, blocks: Sequence[int], first: int) -> None:
        """Shares them, but leaves holes before index `first`."""
        start = len(self._blocks)
        self._blocks += blocks
        self._ids = ((),)
        self._pool.share(self._blocks[max(start, first) :])
        if first > self.num_holes:
            self._make_holes(start, first)

    def _make_holes(self, held: int, first: int) -> None:
        """Holes before index `first`. Of the first `held` blocks, but for the holes, it has a reference."""
        end = min(first, len(self._blocks))
        self._pool.free(self._blocks[self.num_holes : min(end, held)], spare=True)
        self._blocks[self.num_holes : end] = [HOLE] * (end - self.num_holes)
        self.num_holes = max(self.num_holes, end)
        self._ids = ((),)

    def _shared_at(self, position: int) -> bool:
        index = position // self._pool.block_size
        return index < len(self._blocks) and self._pool.references(self._blocks[index]) > 1


class BlockTables:
    """The tables of one sequence in several KV groups, all of the same length. Its calls are those of `BlockTable`."""

    def __init__(self, pool: BlockPool, tables: Sequence[BlockTable] | None = None) -> None:
        """tables: one for each group of the pool; None: empty ones."""
        self.by_group = tables or [BlockTable(pool, group) for group in range(len(pool.windows))]
        self._pool = pool
        self._ids: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        """Blocks of a group, holes among them."""
        return len(self.by_group[0])

    @property
    def ids(self) -> tuple[tuple[int, ...], ...]:
        """By group, the blocks by position: the same tuple objects until they change."""
        rows = tuple(table.ids[0] for table in self.by_group)
        if len(rows) != len(self._ids) or any(a is not b for a, b in zip(rows, self._ids, strict=True)):
            self._ids = rows
        return self._ids

    @property
    def held(self) -> Sequence[int]:
        """All blocks without the holes."""
        return [block for table in self.by_group for block in table.held]

    @property
    def num_held(self) -> int:
        """Their number."""
        return sum(table.num_held for table in self.by_group)

    def column(self, index: int) -> list[int]:
        """See `BlockTable.column`."""
        return [table[index] for table in self.by_group]

    def blocks_needed(self, start: int, end: int) -> int:
        """See `BlockTable.blocks_needed`."""
        return sum(table.blocks_needed(start, end) for table in self.by_group)

    def blocks_to_reach(self, start: int, end: int, chunk: int) -> int:
        """See `BlockTable.blocks_to_reach`."""
        return sum(table.blocks_to_reach(start, end, chunk) for table in self.by_group)

    def sees(self, position: int) -> bool:
        """See `BlockTable.sees`."""
        return all(table.sees(position) for table in self.by_group)

    def prepare_write(self, start: int, end: int) -> list[tuple[int, int]]:
        """See `BlockTable.prepare_write`."""
        return [copy for table in self.by_group for copy in table.prepare_write(start, end)]

    def fork(self, num_tokens: int) -> BlockTables:
        """See `BlockTable.fork`."""
        return BlockTables(self._pool, [table.fork(num_tokens) for table in self.by_group])

    def adopt(self, columns: Sequence[Column], num_tokens: int) -> None:
        """See `BlockTable.adopt`."""
        for table in self.by_group:
            table.adopt(columns, num_tokens)

    def replace(self, index: int, column: Column) -> None:
        """See `BlockTable.replace`."""
        for table in self.by_group:
            table.replace(index, column)

    def slide(self, num_tokens: int) -> None:
        """See `BlockTable.slide`."""
        for table in self.by_group:
            table.slide(num_tokens)

    def truncate(self, num_blocks: int) -> None:
        """See `BlockTable.truncate`."""
        for table in self.by_group:
            table.truncate(num_blocks)

    def release(self) -> None:
        """See `BlockTable.release`."""
        self.truncate(0)


Tables = BlockTable | BlockTables
"""What a sequence holds."""


def new_tables(pool: BlockPool) -> Tables:
    """An empty table for each KV group of the pool."""
    return BlockTable(pool) if len(pool.windows) == 1 else BlockTables(pool)
