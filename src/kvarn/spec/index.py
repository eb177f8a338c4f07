"""`NgramIndex`: where a text ended with the same tokens before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CANDIDATES = 16
"""Earlier places that are looked at for the longest match, latest first."""


@dataclass(frozen=True, slots=True)
class Match:
    """The last `length` tokens of a text are those of `tokens` before position `end`."""

    tokens: Sequence[int]
    end: int
    length: int

    def following(self, count: int) -> tuple[int, ...]:
        """The `count` tokens that follow there; where the tokens end the copy goes on with what it has copied."""
        known = self.tokens[self.end : self.end + count]
        period = len(self.tokens) - self.end
        if len(known) == count or not period:
            return tuple(known)
        return tuple(known[place % period] for place in range(count))


class NgramIndex:
    """Finds the longest match of the end of a text among earlier tokens, up to n_max tokens long and of n_min at least.

    A hash table has the latest place of every n_min-gram, and each place points to the one before it with the same
    n-gram: the hash chains by which deflate finds its matches (Deutsch 1996, RFC 1951, section 4). A token is taken in
    in O(1); a search looks at `CANDIDATES` places at most. One entry and one number are kept a token.
    """

    def __init__(self, tokens: Sequence[int], n_min: int, n_max: int) -> None:
        """tokens: those to find matches in. The list is not copied: what is appended to it is found, too."""
        self.tokens = tokens
        self._n_min = n_min
        self._n_max = n_max
        self._latest: dict[tuple[int, ...], int] = {}
        self._before: list[int] = []
        """By place: the latest place before it that ends the same n-gram; 0: none. A place is an end: the number of
        tokens up to there."""

    def find(self, text: Sequence[int]) -> Match | None:
        """The longest match of the end of `text`, of several the latest, that something follows; None without one."""
        self._catch_up()
        n_min = self._n_min
        if len(text) < n_min:
            return None
        place = self._latest.get(tuple(text[-n_min:]), 0)
        most = min(self._n_max, len(text))
        best_end = best_length = 0
        for _ in range(CANDIDATES):
            if not place:
                break
            if place < len(self.tokens):
                length = self._common(text, place, most)
                if length > best_length:
                    best_end, best_length = place, length
                    if length == most:
                        break
            place = self._before[place]
        return Match(self.tokens, best_end, best_length) if best_length else None

    def _common(self, text: Sequence[int], end: int, most: int) -> int:
        """How many tokens before `end` are the last of `text`; n_min of them are known to be."""
        tokens, length, most = self.tokens, self._n_min, min(most, end)
        while length < most and tokens[end - length - 1] == text[-length - 1]:
            length += 1
        return length

    def _catch_up(self) -> None:
        """Takes in what has been appended to the tokens."""
        tokens, latest, before, n_min = self.tokens, self._latest, self._before, self._n_min
        for end in range(len(before), len(tokens) + 1):
            if end < n_min:
                before.append(0)
                continue
            ngram = tuple(tokens[end - n_min : end])
            before.append(latest.get(ngram, 0))
            latest[ngram] = end
