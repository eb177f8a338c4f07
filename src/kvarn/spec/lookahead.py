"""Lookahead decoding: n-grams that the model itself makes up ahead of its text, and verifies when they come up."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvarn.config import SpeculativeConfig
from kvarn.draft_tree import child
from kvarn.runner import BlocklessDrafter, Proposal, logits_rows
from kvarn.spec.ngram_pool import NgramPool
from kvarn.step import NewSequence, SampledToken, ScheduledSequence, SchedulerOutput


class LookaheadWindow:
    """The lookahead branch of one sequence: W columns of N - 1 tokens, column j beginning j tokens ahead.

    In each step a row is computed for each of its tokens, which gives each column a token more at its end, the model's
    own; then it is an n-gram, and loses its first token (Jacobi iterations of different age, one below the other). It
    begins with tokens of the prompt in any order, and an n-gram of which more than the first token still is such a one
    does not count. Where several tokens came in a step the columns stay where they are in relation to the text's end:
    moving them with the text makes no better n-grams.
    """

    def __init__(self, width: int, depth: int, text: Sequence[int], seed: int) -> None:
        """width: W. depth: N - 1. text: its tokens to begin with, at least one. seed: for their order."""
        draw = random.Random(seed)
        self.columns = [draw.choices(text, k=depth) for _ in range(width)]
        self._made = 0
        """Tokens of a column that are the model's."""

    def tree(self) -> tuple[list[int], list[int]]:
        """Tokens and parents (see `kvarn.draft_tree`): the columns' first tokens are a chain, and from each of them its
        column goes down. Those of one level stand together; so a token's row sees the text that it would stand in."""
        width = len(self.columns)
        tokens = [column[level] for level in range(len(self.columns[0])) for column in self.columns]
        return tokens, [*range(-1, width - 1), *range(len(tokens) - width)]

    def advance(self, following: Sequence[int]) -> list[list[int]]:
        """Takes in what follows each column; returns the n-grams that this makes."""
        grams = [[*column, token] for column, token in zip(self.columns, following, strict=True)]
        self.columns = [gram[1:] for gram in grams]
        self._made += 1
        return grams if self._made >= len(grams[0]) - 1 else []


class _State:
    """What is kept of a sequence. Its text and window are taken in when the first guess is wanted."""

    def __init__(self, new: NewSequence, guesses: int) -> None:
        self.seed = new.seed
        self.tokens = list(new.prompt_token_ids)
        self.pool = NgramPool(guesses)
        self.pooled = 0
        """Tokens of the text whose n-grams are in the pool."""
        self.window: LookaheadWindow | None = None
        self.branch: tuple[tuple[int, ...], tuple[int, ...]] = (), ()
        """The window's tree, where it is in the draft that was proposed last."""


class LookaheadDrafter(BlocklessDrafter):
    """Fu et al. 2024, "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding".

    A draft is one tree: the window (`LookaheadWindow`), whose rows are for the n-grams that come of them, and up to G
    n-grams that begin with the last token (section 3.2). Those of the text itself are known, too. The window's tokens
    are guesses like others: they are accepted where they are right.

    The window's rows come first in the draft, as without them there would be no n-grams to guess with, and a controller
    that finds them too dear for what they bring stops the whole.
    """

    def __init__(self, config: SpeculativeConfig, logits: str = "logits") -> None:
        """config: window, ngram and guesses are W, N and G. logits: the program's output buffer."""
        self.buffers: Sequence[str] = (logits,)
        self._config = config
        self._logits = logits
        self._states: dict[int, _State] = {}

    def add(self, sequence: NewSequence) -> None:
        """See `Drafter.add`."""
        self._states[sequence.sequence_id] = _State(sequence, self._config.guesses)

    def remove(self, sequence_id: int) -> None:
        """See `Drafter.remove`."""
        self._states.pop(sequence_id, None)

    def propose(
        self,
        scheduled: SchedulerOutput,
        sampled: Sequence[SampledToken],
        values: Mapping[str, NDArray[np.float32]],
    ) -> Sequence[Proposal]:
        """See `Drafter.propose`."""
        rows, logits = logits_rows(scheduled), values[self._logits]
        for token in sampled:
            self._states[token.sequence_id].tokens.append(token.token_id)
        for part in scheduled.sequences:
            if part.draft:
                self._look(self._states[part.sequence_id], part, logits[rows[part.sequence_id] + 1 :])
        asked = [part for part in scheduled.sequences if part.num_drafts_wanted]
        share = self._config.max_step_drafts // max(1, len(asked))
        return [self._guess(self._states[part.sequence_id], part, share) for part in asked]

    def _look(self, state: _State, part: ScheduledSequence, logits: NDArray[np.float32]) -> None:
        """Takes in what the window's rows say, where all of them were computed. logits: of the draft's rows, first."""
        count = len(state.branch[0])
        if state.window is not None and count and (part.draft[:count], part.parents[:count]) == state.branch:
            width = self._config.window
            following = logits[count - width : count].argmax(axis=1)
            for gram in state.window.advance([int(token) for token in following]):
                state.pool.add(gram)

    def _guess(self, state: _State, part: ScheduledSequence, share: int) -> Proposal:
        config, nodes = self._config, min(part.num_nodes_wanted, share)
        self._pool_text(state)
        tokens: list[int] = []
        parents: list[int] = []
        if config.window_rows <= nodes and config.window + config.ngram - 2 <= part.num_drafts_wanted:
            if state.window is None:
                state.window = LookaheadWindow(config.window, config.ngram - 1, state.tokens, state.seed)
            tokens, parents = state.window.tree()
        state.branch = tuple(tokens), tuple(parents)
        for rest in state.pool.after(state.tokens[-1]):
            _graft(tokens, parents, rest[: part.num_drafts_wanted], nodes)
        return Proposal(part.sequence_id, tuple(tokens), parents=tuple(parents))

    def _pool_text(self, state: _State) -> None:
        size = self._config.ngram
        for end in range(max(size, state.pooled + 1), len(state.tokens) + 1):
            state.pool.add(state.tokens[end - size : end])
        state.pooled = len(state.tokens)


def _graft(tokens: list[int], parents: list[int], path: Sequence[int], most: int) -> None:
    """Adds a path from the last known token to a tree, what of it is not there yet, as far as it has `most` guesses."""
    at = -1
    for token in path:
        found = child(tokens, parents, at, token)
        if found < 0:
            if len(tokens) >= most:
                return
            found = len(tokens)
            tokens.append(token)
            parents.append(at)
        at = found
