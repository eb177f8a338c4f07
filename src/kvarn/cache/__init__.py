"""Which blocks hold whose keys and values. Ids and counts only; the bytes belong to the back-end.

`BlockPool` owns the ids of all blocks and counts references, `BlockTable` is one sequence's list of them, and
`PrefixCache` is the seam for finding blocks that were computed before.
"""

from kvarn.cache.pool import BlockPool, OutOfBlocksError
from kvarn.cache.prefix import NullPrefixCache, PrefixCache
from kvarn.cache.table import BlockTable, blocks_for

__all__ = ["BlockPool", "BlockTable", "NullPrefixCache", "OutOfBlocksError", "PrefixCache", "blocks_for"]
