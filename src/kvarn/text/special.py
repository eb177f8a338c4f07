"""Finding special tokens that are spelt out in text."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

Span = tuple[int, int]
"""Start and end of a part of a text."""


class TokenFinder:
    """Finds occurrences of many fixed strings: the leftmost, and of those that begin there the longest.

    Vocabularies have up to thousands of such tokens and texts up to megabytes, so candidates are looked up by their
    first two characters, which a regular expression finds.
    """

    def __init__(self, control: Mapping[str, int], defined: Mapping[str, int]) -> None:
        self._control = {text: token for text, token in control.items() if text}
        self._ids = {text: token for text, token in defined.items() if text} | self._control
        lengths: dict[str, set[int]] = {}
        for text in self._ids:
            lengths.setdefault(text[:2], set()).add(len(text))
        for start, known in lengths.items():
            if start[0] in self._ids:
                known.add(1)
        self._lengths = {start: sorted(known, reverse=True) for start, known in lengths.items()}
        starts = sorted(self._lengths, key=len, reverse=True)
        self._start = re.compile("|".join(map(re.escape, starts))) if starts else None

    def find(self, text: str, literal: Sequence[Span] = ()) -> Iterator[tuple[int, int, int]]:
        """(start, end, token id) of disjoint occurrences, left to right.

        literal: ordered, disjoint spans; a control token that touches one is not found.
        """
        if self._start is None:
            return
        ends = [end for _, end in literal]
        position = 0
        while (match := self._start.search(text, position)) is not None:
            start = position = match.start()
            for length in self._lengths[match.group()]:
                candidate = text[start : start + length]
                token = self._ids.get(candidate)
                if (
                    token is None
                    or len(candidate) < length
                    or (candidate in self._control and _touches(literal, ends, start, start + length))
                ):
                    continue
                position = start + length
                yield start, position, token
                break
            else:
                position += 1


def _touches(spans: Sequence[Span], ends: Sequence[int], start: int, end: int) -> bool:
    """Whether start … end overlaps one of the spans, whose ends are `ends`."""
    following = bisect_right(ends, start)
    return following < len(spans) and spans[following][0] < end


class Partition:
    """Cuts text at special and added tokens.

    control: tokens that are matched only where the caller asks for them. defined: tokens that the vocabulary wants
    matched in any text, before the rest is tokenized (whitespace runs, markup).
    """

    def __init__(self, control: Mapping[str, int], defined: Mapping[str, int]) -> None:
        self._control = control
        self._defined = defined

    @cached_property
    def _in_text(self) -> TokenFinder:
        return TokenFinder({}, self._defined)

    @cached_property
    def _everywhere(self) -> TokenFinder:
        return TokenFinder(self._control, self._defined)

    def split(self, text: str, *, parse_special: bool, literal: Sequence[Span] = ()) -> Iterator[str | int]:
        """Token ids, and the non-empty texts between them, in order. In `literal` spans control tokens are text."""
        finder = self._everywhere if parse_special else self._in_text
        position = 0
        for start, end, token in finder.find(text, literal):
            if start > position:
                yield text[position:start]
            yield token
            position = end
        if position < len(text):
            yield text[position:]
