"""`StopMatcher`: finds the first of several stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """An automaton over all stop strings (Aho & Corasick 1975). O(1) amortized work a character.

    Text counts as arriving character by character, so that the result does not depend on where tokens end: the stop
    string that is completed first wins, of several completed by the same character the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._stop: list[str | None] = [None]
        self._fallback = [0]
        self._state = 0
        for stop in dict.fromkeys(stops):
            if stop:
                self._insert(stop)
        self._link()

    @property
    def pending(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        return self._depth[self._state]

    def feed(self, text: str) -> tuple[str, int] | None:
        """Takes the next text. Returns a stop string that it completes and where in `text` that ends."""
        state = self._state
        for position, character in enumerate(text, 1):
            while state and character not in self._next[state]:
                state = self._fallback[state]
            state = self._next[state].get(character, 0)
            stop = self._stop[state]
            if stop is not None:
                self._state = state
                return stop, position
        self._state = state
        return None

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self._next[state].get(character)
            if following is None:
                following = self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._stop.append(None)
                self._fallback.append(0)
            state = following
        self._stop[state] = stop

    def _link(self) -> None:
        """For every state, the longest proper end of its text that begins a stop string, breadth first."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, following in self._next[state].items():
                fallback = self._fallback[state]
                while fallback and character not in self._next[fallback]:
                    fallback = self._fallback[fallback]
                self._fallback[following] = self._next[fallback].get(character, 0)
                if self._stop[following] is None:
                    self._stop[following] = self._stop[self._fallback[following]]
                queue.append(following)
