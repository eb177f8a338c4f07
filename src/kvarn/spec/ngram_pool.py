"""`NgramPool`: what followed a token, the latest last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

MAX_TOKENS = 1 << 14
"""First tokens remembered; the one that was used longest ago is forgotten first."""


class NgramPool:
    """N-grams by their first token, of each no more than a number of them (Fu et al. 2024, section 3.2)."""

    def __init__(self, per_token: int) -> None:
        """per_token: n-grams of a first token; the one that was seen longest ago is forgotten first."""
        self._per_token = per_token
        self._after: OrderedDict[int, OrderedDict[tuple[int, ...], None]] = OrderedDict()

    def add(self, ngram: Sequence[int]) -> None:
        """Remembers that the first token was followed by the others."""
        first, *rest = ngram
        known = self._after.setdefault(first, OrderedDict())
        self._after.move_to_end(first)
        known[tuple(rest)] = None
        known.move_to_end(tuple(rest))
        if len(known) > self._per_token:
            known.popitem(last=False)
        if len(self._after) > MAX_TOKENS:
            self._after.popitem(last=False)

    def after(self, token: int) -> list[tuple[int, ...]]:
        """What followed it, the latest first."""
        return list(reversed(self._after.get(token, ())))
