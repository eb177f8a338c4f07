"""`BlockPool`: ids of KV blocks, a free list, and a reference count for each block (Kwon et al. 2023, section 4.3)."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from kvarn.cache.windows import Windows


class OutOfBlocksError(Exception):
    """More blocks were asked for than are free. Callers check `num_free` first, so this marks a bug."""


class BlockPool:
    """Ids 0 … num_blocks - 1, each free or held by one or more owners.

    An owner is whoever will call `free`: a block table, or a prefix cache. A block returns to the free list when its
    last reference is freed. The block freed last is allocated first, so that a light load touches little memory.

    A prefix cache owns blocks by `keep`. While nobody else holds such a block it is idle: it can be had by letting go
    of it. Idle blocks stand in the order in which they became idle. Tables free theirs from the last to the first and
    share whole beginnings, so a block stands before those it continues: taken in this order (`oldest_idle`), the least
    recently used go first, and each after all that continue it, without a search.

    A block that fell out of a window while its sequence went on is of use only to who turns off there, the others to
    all who go on from where the sequence ends: such spare blocks are taken before all others, those first that fell out
    first.
    """

    def __init__(self, num_blocks: int, block_size: int, windows: tuple[int | None, ...] = (None,)) -> None:
        """num_blocks: ids to hand out. block_size: tokens in a block. windows: of the KV groups that share them."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.windows = Windows(block_size, windows)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._kept = bytearray(num_blocks)
        # Of a dict, whose places stay when what was first is gone, finding the first takes longer and longer.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._spare: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_idle(self) -> int:
        """Blocks that only a prefix cache holds, and would let go of."""
        return len(self._idle) + len(self._spare)

    @property
    def num_available(self) -> int:
        """Free or idle."""
        return len(self._free) + len(self._idle) + len(self._spare)

    @property
    def oldest_idle(self) -> int | None:
        """The block that is to go first: the one that has been spare for longest, or else idle."""
        return next(iter(self._spare or self._idle), None)

    def references(self, block: int) -> int:
        """How many owners hold the block."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks, one reference each; raises OutOfBlocksError, taking none, if fewer are free."""
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks asked for, {len(self._free)} of {self.num_blocks} free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Adds one reference to each of the blocks, which somebody must hold already."""
        for block in blocks:
            if self._references[block] == 0:
                raise ValueError(f"block {block} is free and cannot be shared")
            if self._references[block] == 1 and self._kept[block]:
                self._use(block)
            self._references[block] += 1

    def free(self, blocks: Iterable[int], *, spare: bool = False) -> None:
        """Drops one reference from each of the blocks. spare: which fell out of a window."""
        idle = self._spare if spare else self._idle
        for block in blocks:
            if self._references[block] == 0:
                raise ValueError(f"block {block} is freed twice")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
            elif self._references[block] == 1 and self._kept[block]:
                idle[block] = None

    def keep(self, block: int) -> None:
        """Adds the prefix cache's reference to a block that a table holds, until `drop`."""
        self.share((block,))
        self._kept[block] = True

    def drop(self, block: int) -> None:
        """Takes back what `keep` added."""
        self._kept[block] = False
        self._use(block)
        self.free((block,))

    def _use(self, block: int) -> None:
        """It is not idle any more, if it was."""
        self._idle.pop(block, None)
        self._spare.pop(block, None)

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Raises AssertionError unless `owners` (all block lists that exist) explain every count and every free block.

        For tests: it walks the whole pool.
        """
        held = Counter(block for owner in owners for block in owner)
        for block, count in enumerate(self._references):
            assert held[block] == count, f"block {block}: {count} references counted, {held[block]} found"
        free = sorted(self._free)
        expected = [block for block, count in enumerate(self._references) if count == 0]
        assert free == expected, f"free list {free}, but unreferenced are {expected}"
        idle = [block for block, count in enumerate(self._references) if count == 1 and self._kept[block]]
        known = sorted([*self._idle, *self._spare])
        assert known == idle, f"idle are {known}, but only the cache holds {idle}"
