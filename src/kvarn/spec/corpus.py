"""`Corpora`: what ended sequences said, for later ones of the same salt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvarn.spec.index import NgramIndex

MAX_SALTS = 64
"""Salts whose texts are remembered; the one that ended a sequence longest ago is forgotten first."""

Salt = tuple[str, str]


class Corpora:
    """For each salt the outputs of its ended sequences, no more tokens than a limit.

    A salt is (tenant, cache_salt). What one has said is never matched for another, whose time would tell of it.
    """

    def __init__(self, max_tokens: int, n_min: int, n_max: int) -> None:
        """max_tokens: remembered of a salt. n_min, n_max: see `NgramIndex`."""
        self._max_tokens = max_tokens
        self._n_min = n_min
        self._n_max = n_max
        self._texts: OrderedDict[Salt, list[NgramIndex]] = OrderedDict()

    def add(self, salt: Salt, tokens: Sequence[int]) -> None:
        """Remembers an output. A half of the limit is forgotten at once, when both halves are full."""
        half = max(1, self._max_tokens // 2)
        indexes = self._texts.setdefault(salt, [])
        self._texts.move_to_end(salt)
        if len(self._texts) > MAX_SALTS:
            self._texts.popitem(last=False)
        tokens = tokens[-half:]
        if not indexes or len(indexes[0].tokens) + len(tokens) > half:
            indexes.insert(0, NgramIndex([], self._n_min, self._n_max))
            del indexes[2:]
        newest = indexes[0].tokens
        assert isinstance(newest, list)
        newest += tokens

    def of(self, salt: Salt) -> Iterable[NgramIndex]:
        """The salt's texts, newest first."""
        return self._texts.get(salt, ())

    def num_tokens(self, salt: Salt) -> int:
        """Tokens remembered of a salt."""
        return sum(len(index.tokens) for index in self.of(salt))
