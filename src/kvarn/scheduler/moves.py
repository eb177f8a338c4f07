"""`MoveCost`: whether a block is better kept in the second tier or computed again, by what both took."""

from __future__ import annotations

LEAST_TOKENS = 32
"""Steps with fewer tokens are decodes, bound by the weights: a prompt's tokens cost less than theirs."""
SHARE = 0.1
"""Of each new measurement in the average."""


class MoveCost:
    """Compares the bytes to move with the tokens to recompute, block by block: both grow with their number alike."""

    def __init__(self, block_size: int, block_seconds: float) -> None:
        """block_seconds: to save and load a block of `block_size` tokens, measured."""
        self.block_seconds = block_seconds
        self._block_size = block_size
        self._token_seconds: float | None = None

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Told what each step took; 0: not measured."""
        if num_tokens >= LEAST_TOKENS and seconds > 0:
            mean, new = self._token_seconds, seconds / num_tokens
            self._token_seconds = new if mean is None else mean + SHARE * (new - mean)

    @property
    def recompute_seconds(self) -> float | None:
        """To compute the tokens of a block again; None: not known yet."""
        return None if self._token_seconds is None else self._token_seconds * self._block_size

    @property
    def worthwhile(self) -> bool:
        """Whether moving is cheaper; also while nothing was measured."""
        recompute = self.recompute_seconds
        return recompute is None or self.block_seconds < recompute
