"""Several models behind one server: which of them are in memory, who waits for them, and who must go."""

from kvarn.server.models.pool import ModelPool, PoolLimits
from kvarn.server.models.pooled import Hosted, Lease, Loader, ModelState, ModelStatus, PooledModel

__all__ = [
    "Hosted", "Lease", "Loader", "ModelPool", "ModelState", "ModelStatus", "PoolLimits", "PooledModel",
]  # fmt: skip
