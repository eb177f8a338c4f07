"""`RuleBook`: the rules of sequences as a back-end that samples by itself takes them, and whom it may sample for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvarn.backends.row_rules import BIAS, ROW, RowRules
from kvarn.sampling.base import allowed_mask, check_ids
from kvarn.step import NewSequence

UINT64 = (1 << 64) - 1
_NO_ROWS = np.zeros(0, ROW)


def needs_host(sequence: NewSequence) -> bool:
    """Whether its tokens must be chosen on the host, each after the one before is known there.

    So it is where rules depend on what was said (penalties, min_tokens, forbidden sequences, a grammar), and where more
    is asked for than tokens: logprobs, an embedding.
    """
    p = sequence.sampling
    penalized = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
    return (
        penalized
        or (p.min_tokens > 0 and bool(sequence.stop_token_ids))
        or any(len(word) > 1 for word in p.bad_words)
        or p.grammar is not None
        or p.logprobs is not None
        or p.prompt_logprobs is not None
        or sequence.pooling is not None
    )


class RuleBook:
    """Rules by sequence. Owned by one runner; not thread-safe."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._everything = np.full((1, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        self._rows: dict[int, NDArray[np.void]] = {}
        self._masks: dict[int, NDArray[np.uint32]] = {}
        self._biases: dict[int, NDArray[np.void]] = {}

    def add(self, sequence: NewSequence) -> None:
        """A sequence that does not need the host. Raises RequestError (see `check_ids`)."""
        p = sequence.sampling
        check_ids(p, self._vocab_size)
        row = np.zeros(1, ROW)
        row["temperature"], row["top_p"], row["min_p"], row["top_k"] = p.temperature, p.top_p, p.min_p, p.top_k
        row["seed"], row["stream"] = sequence.seed & UINT64, sequence.stream
        self._rows[sequence.sequence_id] = row
        allowed = allowed_mask(p, self._vocab_size)
        if allowed is not None:
            self._masks[sequence.sequence_id] = allowed
        if p.logit_bias:
            biases = [(0, token, bias) for token, bias in p.logit_bias.items()]
            self._biases[sequence.sequence_id] = np.array(biases, BIAS)

    def remove(self, sequence_id: int) -> None:
        """Forgets a sequence; unknown ones are ignored."""
        for kept in (self._rows, self._masks, self._biases):
            kept.pop(sequence_id, None)

    def of(self, sequence_ids: Sequence[int], positions: Sequence[int]) -> RowRules:
        """The rules of rows of logits. positions: where the sampled tokens will stand."""
        rows = np.concatenate([_NO_ROWS, *(self._rows[sequence_id] for sequence_id in sequence_ids)])
        rows["position"] = positions
        masks, biases = [self._everything], [np.zeros(0, BIAS)]
        for place, sequence_id in enumerate(sequence_ids) if self._masks or self._biases else ():
            if sequence_id in self._masks:
                rows["mask"][place] = len(masks)
                masks.append(self._masks[sequence_id][None, :])
            if sequence_id in self._biases:
                biases.append(self._biases[sequence_id].copy())
                biases[-1]["row"] = place
        return RowRules(rows, np.concatenate(masks), np.concatenate(biases))
