"""Several models behind one server: which of them are in memory, who waits for them, and who must go."""

from kvarn.server.models.keep_alive import FOREVER, parse_keep_alive
from kvarn.server.models.pool import ModelPool, PoolLimits
from kvarn.server.models.pooled import Hosted, Lease, Loader, ModelState, ModelStatus, PooledModel

__all__ = [
    "FOREVER", "Hosted", "Lease", "Loader", "ModelPool", "ModelState", "ModelStatus", "PoolLimits", "PooledModel",
    "parse_keep_alive",
]  # fmt: skip
