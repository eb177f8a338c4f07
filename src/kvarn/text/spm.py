"""SentencePiece's BPE with byte fallback, for vocabularies that have scores and no merges.

Why not the `tokenizers` library: its BPE ranks pairs of tokens. SentencePiece ranks the token that a pair makes, takes
the leftmost of equals, and joins neighbours that are no tokens themselves. Where ab, bc and ca score the same, abc,
bca and cab are each joined at the left, which no ranking of the three pairs gives. Listing all pairs is also what would
take longest in loading a vocabulary of 262,144.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import add, neg

from kvarn.text.vocabulary import SPACE

CACHED_WORDS = 50_000
CACHED_WORD_CHARS = 32


class SentencePieceBPE:
    """Joins the adjacent pair whose joint token scores best until none is left (Kudo & Richardson 2018; the greedy
    order and its ties are those of SentencePiece's bpe_model.cc).

    ids and scores: the tokens that text may become (no control, unknown or byte tokens) and their scores, by spelling.
    byte_ids: ids of the tokens for bytes 0 … 255, for characters without a token. unknown: for characters that have no
    byte tokens either.
    space_prefix: a space is put before text at the beginning and after a special token.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        scores: Mapping[str, float],
        *,
        byte_ids: Sequence[int | None],
        unknown: int | None,
        space_prefix: bool,
    ) -> None:
        self._ids = ids
        self._ranks = dict(zip(scores, map(neg, scores.values()), strict=True))
        self._byte_ids = byte_ids
        self._unknown = unknown
        self._space_prefix = space_prefix
        self._words: dict[str, list[int]] = {}

    def encode(self, text: str, *, after_text: bool) -> list[int]:
        """Token ids of a fragment."""
        if self._space_prefix and not after_text:
            text = " " + text
        ids: list[int] = []
        words = self._words
        for word in self._word_border.split(text.replace(" ", SPACE)):
            known = words.get(word)
            if known is None:
                known = self._encode_word(word)
                if len(word) <= CACHED_WORD_CHARS and len(words) < CACHED_WORDS:
                    words[word] = known
            ids += known
        return ids

    @cached_property
    def _word_border(self) -> re.Pattern[str]:
        """Matches between words: before a ▁, after a character that no token has before a ▁.

        No join can cross such a place, so that words can be encoded, and remembered, one by one.
        """
        before = set(re.findall(f"(.)(?={SPACE})", "\0".join(self._ids), re.DOTALL)) | {"\0"}
        return re.compile(f"(?<=[^{re.escape(''.join(sorted(before)))}])(?={SPACE})")

    def _encode_word(self, word: str) -> list[int]:
        ids: list[int] = []
        for symbol in self._join(word):
            token = self._ids.get(symbol)
            if token is not None:
                ids.append(token)
            else:
                ids += self._fall_back(symbol)
        return ids

    def _fall_back(self, character: str) -> list[int]:
        ids = [self._byte_ids[byte] for byte in character.encode()]
        known = [token for token in ids if token is not None]
        if len(known) < len(ids):
            return [] if self._unknown is None else [self._unknown]
        return known

    def _join(self, word: str) -> list[str]:
        """The symbols of a word after all joins. O(n log n).

        The queue holds (rank, left symbol, right symbol, length of both); an entry is stale where one of the two has
        been joined with another since.
        """
        ranks, symbols, last = self._ranks, list(word), len(word) - 1
        before = list(range(-1, last))
        after = list(range(1, last + 2))
        queue = [
            (ranks[pair], left, left + 1, 2) for left, pair in enumerate(map(add, word, word[1:])) if pair in ranks
        ]
        heapq.heapify(queue)
        while queue:
            _, left, right, length = heapq.heappop(queue)
            first, second = symbols[left], symbols[right]
            if not first or not second or len(first) + len(second) != length:
                continue
            joint = symbols[left] = first + second
            symbols[right] = ""
            following = after[left] = after[right]
            if following <= last:
                before[following] = left
                rank = ranks.get(text := joint + symbols[following])
                if rank is not None:
                    heapq.heappush(queue, (rank, left, following, len(text)))
            preceding = before[left]
            if preceding >= 0:
                rank = ranks.get(text := symbols[preceding] + joint)
                if rank is not None:
                    heapq.heappush(queue, (rank, preceding, left, len(text)))
        return [symbol for symbol in symbols if symbol]
