"""Prompt lookup: what followed when the last tokens occurred before, in the prompt or in the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvarn.runner import BlocklessDrafter, Proposal
from kvarn.spec.corpus import Corpora
from kvarn.spec.index import NgramIndex
from kvarn.step import NewSequence, SampledToken, SchedulerOutput

BEYOND = 2
"""Tokens by which a copy may be longer than the match that it goes on from: what matched for long goes on for long."""


class _Text:
    """All known tokens of a sequence. They are indexed when the first guess is wanted."""

    def __init__(self, new: NewSequence) -> None:
        self.new = new
        self.tokens = list(new.prompt_token_ids)
        self.index: NgramIndex | None = None


class NgramDrafter(BlocklessDrafter):
    """Copies what followed the last occurrence of the longest n-gram that ends a sequence (Saxena 2023, "Prompt Lookup
    Decoding"; matches are found as in `NgramIndex`).

    Costs microseconds a token and no memory but an index of the sequence's own tokens. A copy may run into itself, so
    that a text that repeats is guessed to go on repeating. The longer the match the longer the copy.
    """

    def __init__(self, n_min: int, n_max: int, corpora: Corpora | None = None) -> None:
        """n_min, n_max: see `NgramIndex`. corpora: of ended sequences, looked at where their match is longer."""
        self._n_min = n_min
        self._n_max = n_max
        self._corpora = corpora
        self._texts: dict[int, _Text] = {}

    def add(self, sequence: NewSequence) -> None:
        """See `Drafter.add`."""
        self._texts[sequence.sequence_id] = _Text(sequence)

    def remove(self, sequence_id: int) -> None:
        """See `Drafter.remove`. What the sequence said is kept where there is a corpus."""
        text = self._texts.pop(sequence_id, None)
        if text is not None and self._corpora is not None:
            self._corpora.add(text.new.salt, text.tokens[len(text.new.prompt_token_ids) :])

    def propose(
        self,
        scheduled: SchedulerOutput,
        sampled: Sequence[SampledToken],
        values: Mapping[str, NDArray[np.float32]],
    ) -> Sequence[Proposal]:
        """See `Drafter.propose`."""
        del values
        for token in sampled:
            self._texts[token.sequence_id].tokens.append(token.token_id)
        proposals = []
        for part in scheduled.sequences:
            if part.num_drafts_wanted:
                draft = self._guess(part.sequence_id, part.num_drafts_wanted)
                if draft:
                    proposals.append(Proposal(part.sequence_id, draft, copied=True))
        return proposals

    def _guess(self, sequence_id: int, count: int) -> tuple[int, ...]:
        text = self._texts[sequence_id]
        if text.index is None:
            text.index = NgramIndex(text.tokens, self._n_min, self._n_max)
        best = text.index.find(text.tokens)
        if self._corpora is not None:
            for index in self._corpora.of(text.new.salt):
                found = index.find(text.tokens)
                if found is not None and (best is None or found.length > best.length):
                    best = found
        return () if best is None else best.following(min(count, best.length + BEYOND))
