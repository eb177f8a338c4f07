"""The seam between runner and sampler."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvarn.draft_tree import Parents, chain
from kvarn.errors import RequestError
from kvarn.request import SamplingParams, TokenLogprob
from kvarn.step import NewSequence, SampledToken


@dataclass(frozen=True, slots=True, eq=False)
class TokenMasks:
    """Which tokens the rows of some logits may become. bits: uint32[M, ceil(vocab / 32)], bit i of word w set: token
    32 w + i is allowed. rows: int32[R], by row of the logits the row of `bits`; -1: all tokens are allowed."""

    bits: NDArray[np.uint32]
    rows: NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """What was guessed to follow in a sequence. probabilities: float32[len(token_ids), vocab], the distribution that
    each token was drawn from, all before it given (uses 1 of the random numbers); None: they were not drawn. parents:
    of each token the one that it follows (see `kvarn.draft_tree`); None: each follows the one before, as it must where
    they were drawn."""

    token_ids: tuple[int, ...] = ()
    probabilities: NDArray[np.float32] | None = None
    parents: Parents | None = None


class Sampler(Protocol):
    """Chooses tokens and remembers what each sequence's penalties need. Owned by one runner; not thread-safe."""

    def add(self, sequence: NewSequence) -> None:
        """Takes a sequence in, once; preemption does not end its life here. Raises RequestError (see `check_ids`)."""
        ...

    def remove(self, sequence_id: int) -> None:
        """Forgets a sequence; unknown ones are ignored."""
        ...

    def sample(
        self,
        logits: NDArray[np.float32],
        sequence_ids: Sequence[int],
        positions: Sequence[int],
        masks: TokenMasks | None = None,
    ) -> list[SampledToken]:
        """One token for each row of logits (R, vocab). positions[r]: where the sampled token will stand; with the
        sequence's seed and stream it keys the random number, so that a repeated step draws the same. Where there is
        none to choose, a mark says why (see `SampledToken`), and the sequence's state stays as it is."""
        ...

    def verify(
        self,
        logits: NDArray[np.float32],
        sequence_ids: Sequence[int],
        positions: Sequence[int],
        drafts: Sequence[Draft],
        masks: TokenMasks | None = None,
    ) -> list[SampledToken]:
        """The tokens of each sequence in order: those of its draft that are accepted, then one more.

        logits: for each sequence 1 + len(draft) rows, as after what is known and after each token of the draft, all
        before it given. positions: where the first of its tokens will stand. Rows are looked at one after the other,
        since penalties, `min_tokens` and `bad_words` depend on what was accepted, along what is accepted and not beyond
        the first token that is no draft's (a mark, as of `sample`, is none). What comes has exactly the
        distribution that `sample` would draw from token by token:

        - A draft without probabilities is compared with the token that `sample` would draw in its place, from the same
          random number. So the tokens are the very same as without a draft. (It is the rule below with all of q on
          one token: accepted with p(draft), else drawn from p without it.) Where several tokens of the draft follow
          one, the one that is drawn is gone on from (Miao et al. 2024, SpecInfer, its naive sampling).
        - One with probabilities q is accepted with min(1, p / q), else a token is drawn from max(0, p - q), scaled to
          1; after the last one from p (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2).

        Raises ValueError where shapes do not agree or a draft's token is not in the vocabulary.
        """
        ...

    def guess(
        self,
        logits: NDArray[np.float32],
        sequence_ids: Sequence[int],
        positions: Sequence[int],
        ahead: Sequence[Sequence[int]],
        probabilities: NDArray[np.float32],
        rows: Sequence[int],
    ) -> list[int]:
        """A draft's next token from each row of another model's logits (R, any width), by the rules of its sequence.

        ahead: by row the draft's tokens before it, taken as sampled; the state stays as it is. positions: as in
        `sample`. rows: by row of the logits the row of `probabilities`, float32[any, vocab], that is set to the
        distribution q, from which the token is then drawn by use 1 of the random numbers: for `verify` with q. -1: the
        token is what `sample` would say to these logits, by the same random number. Compared with what `sample` says to
        the model's own logits it is right the more often the more the two agree, and changes nothing. So it is for
        greedy sequences in any case.

        Tokens that one of the two vocabularies lacks are not guessed. A token of -1: the logits hold NaN or infinity,
        or leave nothing to choose.
        """
        ...

    def logprobs(
        self, logits: NDArray[np.float32], token_ids: Sequence[int], counts: Sequence[int]
    ) -> list[TokenLogprob | None]:
        """By row of the logits (R, vocab) what the model itself says of a token, and the `counts[r]` likeliest; None
        where the row holds NaN or infinity, or nothing but minus infinity."""
        ...


def check_drafts(rows: int, vocab_size: int, drafts: Sequence[Draft]) -> list[Parents]:
    """The parents of each draft's tokens. Raises ValueError where `rows` of logits are not what the drafts need, or a
    draft is no draft of these tokens or no tree."""
    needed = sum(1 + len(draft.token_ids) for draft in drafts)
    if rows != needed:
        raise ValueError(f"{rows} rows of logits for drafts that need {needed}")
    for draft in drafts:
        q = draft.probabilities
        if q is not None and q.shape != (len(draft.token_ids), vocab_size):
            raise ValueError(f"probabilities of shape {q.shape} for a draft of {len(draft.token_ids)} tokens")
        if any(not 0 <= token < vocab_size for token in draft.token_ids):
            raise ValueError(f"the draft {draft.token_ids} is not within the vocabulary of {vocab_size}")
    return [_check_parents(draft) for draft in drafts]


def _check_parents(draft: Draft) -> Parents:
    count = len(draft.token_ids)
    straight = chain(count)
    if draft.parents is None or draft.parents == straight:
        return straight
    if draft.probabilities is not None:
        raise ValueError(f"a draft that was drawn must be a chain, not a tree of parents {draft.parents}")
    if len(draft.parents) != count or any(not -1 <= p < place for place, p in enumerate(draft.parents)):
        raise ValueError(f"{draft.parents} are not the parents of {count} tokens, each before its own")
    return draft.parents


def check_guesses(
    logits: NDArray[np.float32], probabilities: NDArray[np.float32], vocab_size: int, rows: Sequence[int]
) -> None:
    """Raises ValueError where there is no room for the probabilities of guesses."""
    if len(rows) != len(logits):
        raise ValueError(f"{len(logits)} rows of logits, but {len(rows)} of probabilities")
    if probabilities.ndim != 2 or probabilities.shape[1] != vocab_size:
        raise ValueError(f"probabilities of shape {probabilities.shape} for a vocabulary of {vocab_size}")
    if any(not -1 <= row < len(probabilities) for row in rows):
        raise ValueError(f"a row of probabilities is out of range 0…{len(probabilities) - 1}")


def check_masks(rows: int, vocab_size: int, masks: TokenMasks | None) -> None:
    """Raises ValueError where masks do not fit so many rows of logits."""
    if masks is None:
        return
    words = -(-vocab_size // 32)
    if masks.bits.ndim != 2 or masks.bits.shape[1] != words:
        raise ValueError(f"masks of shape {masks.bits.shape}; a row has {words} words")
    if masks.rows.shape != (rows,) or (rows and not -1 <= masks.rows.min() <= masks.rows.max() < len(masks.bits)):
        raise ValueError(f"each of {rows} rows of logits needs a row of masks, or -1")


def check_ids(sampling: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError where a parameter names a token that the vocabulary does not have."""
    named: list[tuple[str, Iterable[int]]] = [
        ("logit_bias", sampling.logit_bias),
        ("stop_token_ids", sampling.stop_token_ids),
        ("allowed_token_ids", sampling.allowed_token_ids or ()),
        *(("bad_words", word) for word in forbidden_sequences(sampling)),
    ]
    for field, ids in named:
        for token in ids:
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"{field} names token {token}; the vocabulary has 0 to {vocab_size - 1}", field=field
                )


def forbidden_sequences(sampling: SamplingParams) -> list[tuple[int, ...]]:
    """The token sequences of `bad_words`. Raises ValueError for a text: who adds a request makes tokens of those."""
    sequences = [word for word in sampling.bad_words if not isinstance(word, str)]
    if len(sequences) != len(sampling.bad_words):
        raise ValueError("a sampler takes bad_words as token ids")
    return sequences


def allowed_mask(sampling: SamplingParams, vocab_size: int) -> NDArray[np.uint32] | None:
    """A row of `TokenMasks` of `allowed_token_ids`, without what a single token of `bad_words` forbids; None where all
    tokens are allowed."""
    single = [word[0] for word in forbidden_sequences(sampling) if len(word) == 1]
    if sampling.allowed_token_ids is None and not single:
        return None
    allowed = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    allowed[slice(vocab_size) if sampling.allowed_token_ids is None else list(sampling.allowed_token_ids)] = 1
    allowed[single] = 0
    return np.packbits(allowed, bitorder="little").view("<u4").astype(np.uint32)
