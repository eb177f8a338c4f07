"""When blocks go to the second tier and come back: `Moves`, and `MoveCost`, which compares that with computing."""

from __future__ import annotations

from typing import Protocol

from kvarn.scheduler.cost import StepCost, StepShape

NOTHING = StepShape(0, 0, 0, 0)


class Moves(Protocol):
    """Decides between moving blocks and computing their tokens again."""

    def worth_saving(self) -> bool:
        """Whether a block that is evicted is to be saved."""
        ...

    def worth_loading(self, start: int, num_blocks: int) -> bool:
        """Whether so many blocks from position `start` on, which the second tier has, are to be loaded."""
        ...


class AlwaysMove:
    """Moves whatever can be moved."""

    def worth_saving(self) -> bool:
        """Yes."""
        return True

    def worth_loading(self, start: int, num_blocks: int) -> bool:
        """Yes."""
        del start, num_blocks
        return True


class MoveCost:
    """Moves what takes less to move than to compute, by the engine's model of what steps take.

    A block is saved where saving and loading it takes less than computing it at the begin of a text, where that is
    cheapest: so it is worth loading wherever it stands. When it is to be loaded, saving it is past and counts no more,
    and its tokens look at all that is before them.
    """

    def __init__(self, block_size: int, save_seconds: float, load_seconds: float, cost: StepCost) -> None:
        """save_seconds, load_seconds: of a block of `block_size` tokens. cost: of steps that move nothing."""
        self._block_size = block_size
        self._save_seconds = save_seconds
        self._load_seconds = load_seconds
        self._cost = cost

    def worth_saving(self) -> bool:
        """See `Moves`."""
        return self._save_seconds + self._load_seconds <= self.compute_seconds(0, 1)

    def worth_loading(self, start: int, num_blocks: int) -> bool:
        """See `Moves`."""
        return num_blocks * self._load_seconds <= self.compute_seconds(start, num_blocks)

    def compute_seconds(self, start: int, num_blocks: int) -> float:
        """What so many blocks from position `start` on add to a step that computes and samples what follows them."""
        tokens = num_blocks * self._block_size
        whole, rest = NOTHING.plus(start, tokens + 1), NOTHING.plus(start + tokens, 1)
        return self._cost.seconds(whole) - self._cost.seconds(rest)
