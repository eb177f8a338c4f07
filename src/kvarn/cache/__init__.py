"""Which blocks hold whose keys and values. Ids and counts only; the bytes belong to the back-end.

`BlockPool` owns the ids of all blocks and counts references, `Tables` are one sequence's lists of them, a `BlockTable`
for each KV group, whose layers see what `Windows` says, and
`PrefixCache` is the seam for finding blocks that were computed before: `RadixPrefixCache` does.
`OffloadIndex` knows which of those it evicted lie in a second tier.
"""

from kvarn.cache.offload import OffloadIndex
from kvarn.cache.pool import BlockPool, OutOfBlocksError
from kvarn.cache.prefix import NullPrefixCache, PrefixCache, PrefixHit, PrefixPath
from kvarn.cache.radix import RadixPrefixCache
from kvarn.cache.salt import Salt
from kvarn.cache.table import HOLE, BlockTable, BlockTables, Tables, new_tables
from kvarn.cache.tree import common_length
from kvarn.cache.windows import Windows, blocks_for

__all__ = [
    "HOLE", "BlockPool", "BlockTable", "BlockTables", "NullPrefixCache", "OffloadIndex", "OutOfBlocksError",
    "PrefixCache", "PrefixHit", "PrefixPath", "RadixPrefixCache", "Salt", "Tables", "Windows", "blocks_for",
    "common_length", "new_tables",
]  # fmt: skip
