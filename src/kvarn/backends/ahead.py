"""The seam to back-ends that choose tokens by themselves, so that a step can follow before anybody has read them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvarn.backends.base import Executable, InputBatch
from kvarn.backends.row_rules import RowRules


@runtime_checkable
class AheadExecutable(Executable, Protocol):
    """An executable that works while its caller does, in the order of the calls. Two steps at most are under way.

    `execute`, and what copies, moves, reads and writes the cache, come after all that was submitted.
    """

    def submit(self, batch: InputBatch, rules: RowRules, previous: NDArray[np.int32]) -> None:
        """Begins a step and the choice of a token for each of its rows of logits; returns without waiting for them.

        rules: of these rows. previous: int32[T], for each token of the batch the row of
        logits of the step submitted before whose token it is, whatever its id in the batch says; -1: it is that id.
        All arrays are the caller's again. Raises as `execute` does.
        """
        ...

    def collect(self) -> NDArray[np.int32]:
        """Waits for the oldest step that was submitted and not collected: int32[R], token ids, or `NOTHING_LEFT` or
        `NOT_FINITE`, instead of which the step after it read token 0."""
        ...

    def prepare(self) -> bool:
        """Does a piece of what makes later steps faster, of a second or less; False where nothing is left of it until
        other steps have been run. Only while nothing is under way."""
        ...

    def discard(self) -> None:
        """Waits for what is under way, and forgets it, also where it failed."""
        ...
