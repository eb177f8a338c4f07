"""Trees of guessed tokens, as tuples of parents: parent i is the index of guess i's parent among the guesses before it,
-1 where that is the last known token. A chain is the tree in which each guess is the parent of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Parents = tuple[int, ...]


def chain(count: int) -> Parents:
    """The parents of guesses that follow one another."""
    return tuple(range(-1, count - 1))


def child(token_ids: Sequence[int], parents: Sequence[int], parent: int, token: int) -> int:
    """The first guess after `parent` that is this token; -1 where there is none."""
    for place in range(parent + 1, len(parents)):
        if parents[place] == parent and token_ids[place] == token:
            return place
    return -1


def path(token_ids: Sequence[int], parents: Sequence[int], said: Sequence[int]) -> list[int]:
    """The guesses that what was said goes along: of each token said the place in the tree, until one is not in it."""
    places: list[int] = []
    at = -1
    for token in said:
        at = child(token_ids, parents, at, token)
        if at < 0:
            break
        places.append(at)
    return places


def way(parents: Sequence[int], place: int) -> list[int]:
    """The guesses from the last known token to the one at `place`, which is the last of them."""
    places: list[int] = []
    while place >= 0:
        places.append(place)
        place = parents[place]
    return places[::-1]


def levels(parents: Sequence[int]) -> list[int]:
    """How many guesses are before each on its way from the last known token, which is how far ahead it is."""
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent < 0 else found[parent] + 1)
    return found


def pruned(
    token_ids: Sequence[int], parents: Sequence[int], keep: Callable[[int, int], bool]
) -> tuple[tuple[int, ...], Parents]:
    """The tree without some guesses, and what comes after those. keep: is asked for (place, level), in order."""
    tokens: list[int] = []
    kept: list[int] = []
    renamed = {-1: -1}
    for place, level in enumerate(levels(parents)):
        parent = renamed.get(parents[place])
        if parent is not None and keep(place, level):
            renamed[place] = len(kept)
            tokens.append(token_ids[place])
            kept.append(parent)
    return tuple(tokens), tuple(kept)
