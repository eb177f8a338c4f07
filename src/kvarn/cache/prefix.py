"""The seam for reusing computed blocks between sequences: `PrefixCache`, `PrefixPath`, and the null objects."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, Protocol, Self

from kvarn.cache.offload import OffloadIndex
from kvarn.cache.salt import Salt
from kvarn.cache.table import Tables


class PrefixHit(NamedTuple):
    """What a sequence would find in the cache."""

    num_tokens: int = 0
    """Those whose KV is there."""
    num_held_blocks: int = 0
    """Blocks of them, of all KV groups, that it would share with a table or that are never evicted: they take none
    that are available."""


class PrefixPath(Protocol):
    """One sequence's place in the cache. It changes the sequence's block table, and is changed by these calls only."""

    @property
    def num_blocks(self) -> int:
        """Whole blocks of a group, from the first, that the sequence's table has in common with the cache."""
        ...

    def adopt(self, token_ids: Sequence[int], table: Tables, known: int, *, whole_blocks: bool = False) -> int:
        """Puts cached blocks into `table`, which holds the KV of `known` tokens, where more are known then.

        Returns how many are known now: at least `known`, at most all but the last of `token_ids`, which is left to
        compute, since somebody must sample from it. The last block may be adopted for its first tokens only, unless
        `whole_blocks`; `BlockTable.prepare_write` copies it before the rest is written.
        """
        ...

    def peek(self, token_ids: Sequence[int]) -> PrefixHit:
        """What `adopt` would find now, for a sequence with an empty table. Changes nothing, counts as no use."""
        ...

    def insert(self, token_ids: Sequence[int], known: int, table: Tables) -> None:
        """Told when `table` holds the KV of the first `known` tokens: keeps its whole blocks.

        Where the cache has a block with the same KV already, the table gets that one for its own. O(1) where no block
        was filled since the last call.
        """
        ...

    def leave(self, token_ids: Sequence[int], known: int, table: Tables) -> None:
        """Told before the sequence releases `table`: keeps a partly filled last block, too. Back at the start then."""
        ...

    def disown(self, token_ids: Sequence[int], table: Tables) -> None:
        """Releases `table`, whose KV is not to be believed, and has the cache let go of what only that held. Back at
        the start then.

        What other tables hold stays, with all that continues it there: their owners have believed it, too.
        """
        ...

    def fork(self, num_tokens: int) -> Self:
        """The place of a sequence with a fork of the table that holds the first `num_tokens` tokens."""
        ...

    def offloaded(self, token_ids: Sequence[int], most: int) -> list[tuple[int, bytes]]:
        """(slot, name) in the second tier of the whole blocks that follow, up to `most` and the first that it lacks.

        Those of all KV groups one after the other, before the next. Of all but the last of `token_ids`. What is there
        is not checked: see `BlockLoad`.
        """
        ...

    def next_block(self, token_ids: Sequence[int]) -> Hashable:
        """What tells the next whole block from all others; None where there are too few tokens for one.

        Two sequences with equal answers are about to compute the same block, and may share it.
        """
        ...


class PrefixCache(Protocol):
    """Keeps blocks whose KV is that of known tokens after known tokens. Holds a reference on each in the pool."""

    num_evicted_tokens: int
    """Tokens whose KV was let go of."""
    tier: OffloadIndex
    """Where evicted blocks may go."""

    @property
    def num_reserved(self) -> int:
        """Blocks that it may keep for ever: no sequence can count on them."""
        ...

    def path(self, salt: Salt) -> PrefixPath:
        """The place of a new sequence: at the start, with an empty table."""
        ...

    def evict(self, count: int, *, spill: bool = True) -> int:
        """Lets go of blocks that no table holds until `count` more are free, or none is left; returns how many are.

        spill: asks the tier to save them. They must keep their values until the saves are taken and done.
        """
        ...

    def spill_all(self) -> None:
        """Asks the tier to save all blocks that it has room for."""
        ...

    def check(self) -> Iterable[int]:
        """Raises AssertionError where it does not agree with itself; returns the blocks it holds. For tests."""
        ...


class NullPrefixPath:
    """Finds nothing, keeps nothing."""

    num_blocks = 0

    def adopt(self, token_ids: Sequence[int], table: Tables, known: int, *, whole_blocks: bool = False) -> int:
        """Nothing more is known."""
        del token_ids, table, whole_blocks
        return known

    def peek(self, token_ids: Sequence[int]) -> PrefixHit:
        """Nothing."""
        del token_ids
        return PrefixHit()

    def insert(self, token_ids: Sequence[int], known: int, table: Tables) -> None:
        """Keeps nothing."""

    def leave(self, token_ids: Sequence[int], known: int, table: Tables) -> None:
        """Keeps nothing."""

    def disown(self, token_ids: Sequence[int], table: Tables) -> None:
        """Releases the table."""
        del token_ids
        table.release()

    def fork(self, num_tokens: int) -> Self:
        """Itself."""
        del num_tokens
        return self

    def offloaded(self, token_ids: Sequence[int], most: int) -> list[tuple[int, bytes]]:
        """There is no second tier."""
        del token_ids, most
        return []

    def next_block(self, token_ids: Sequence[int]) -> Hashable:
        """Nothing will be shared."""
        del token_ids
        return None


class NullPrefixCache:
    """Caches nothing."""

    num_evicted_tokens = 0
    num_reserved = 0

    def __init__(self) -> None:
        self.tier = OffloadIndex()

    def path(self, salt: Salt) -> NullPrefixPath:
        """The same for everybody."""
        del salt
        return NullPrefixPath()

    def evict(self, count: int, *, spill: bool = True) -> int:
        """There is nothing to let go."""
        del count, spill
        return 0

    def spill_all(self) -> None:
        """There is nothing to save."""

    def check(self) -> Iterable[int]:
        """It holds nothing."""
        return ()
