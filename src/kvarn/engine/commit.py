"""`MemoryCommit`: has the system back the KV cache before it is used, so that load does not pay for that."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvarn.backends import Executable
from kvarn.planning import Available

logger = logging.getLogger(__name__)


class MemoryCommit:
    """Commits the cache of an executable piece by piece, for as long as the system has memory to spare.

    Memory that nobody has used yet is nowhere: the system finds and clears a page when it is first touched, and a
    virtual machine's host may do the same underneath; together that was measured to take up to 2.5 ms a MiB.
    """

    def __init__(self, executable: Executable, spare_bytes: int, available: Callable[[], Available]) -> None:
        """spare_bytes: what others are to find free; it stops where less is. available: what is free now."""
        self._executable = executable
        self._spare = spare_bytes
        self._available = available
        self._left = True

    def piece(self) -> bool:
        """Commits a few MB; False where nothing is left to do. The caller has the executable to itself."""
        if self._left and self._available().num_bytes < self._spare:
            logger.info("memory is short: the rest of the KV cache is taken as it is used")
            self._left = False
        self._left = self._left and self._executable.commit() > 0
        return self._left
