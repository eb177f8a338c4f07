"""`RuleBook`: the rules of sequences as a back-end that samples by itself takes them, and whom it may sample for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvarn.backends.row_rules import EDIT, ROW, RowRules
from kvarn.sampling.base import allowed_mask, check_ids
from kvarn.step import NewSequence

UINT64 = (1 << 64) - 1
_NO_ROWS, _NO_EDITS = np.zeros(0, ROW), np.zeros(0, EDIT)


def needs_host(sequence: NewSequence) -> bool:
    """Whether its tokens must be chosen on the host, each after the one before is known there.

    So it is where what may come depends on what was said in ways that `RowRules` cannot tell (forbidden sequences, a
    grammar), and where more is asked for than tokens: logprobs, an embedding.
    """
    p = sequence.sampling
    return (
        any(len(word) > 1 for word in p.bad_words)
        or p.grammar is not None
        or p.logprobs is not None
        or p.prompt_logprobs is not None
        or sequence.pooling is not None
    )


class _Edits:
    """`EDIT` records of one sequence, which grow."""

    def __init__(self) -> None:
        self._records = np.zeros(16, EDIT)
        self._places: dict[int, int] = {}

    @property
    def records(self) -> NDArray[np.void]:
        """All of them; a view."""
        return self._records[: len(self._places)]

    def of(self, token: int) -> np.void:
        """The record of a token, made where there is none."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._records):
            self._records = np.concatenate([self._records, np.zeros(max(place, 16), EDIT)])
        record: np.void = self._records[place]
        record["token"] = token
        return record

    def see(self, tokens: Iterable[int]) -> None:
        """The prompt has these. Of many tokens at once, since prompts are long."""
        different = set(tokens)
        for token in different & self._places.keys():
            self.of(token)["seen"] = 1
        size, fresh = len(self._places), sorted(different - self._places.keys())
        more = np.zeros(len(fresh), EDIT)
        more["token"], more["seen"] = fresh, 1
        self._records = np.concatenate([self.records, more])
        self._places.update(zip(fresh, range(size, size + len(fresh)), strict=True))


class _Rules:
    """Of one sequence."""

    def __init__(self, sequence: NewSequence, vocab_size: int) -> None:
        p = sequence.sampling
        self.penalized = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        self.mask = allowed_mask(p, vocab_size)
        self.edits = _Edits()
        self.row = np.zeros(1, ROW)
        row = self.row
        row["temperature"], row["top_p"], row["min_p"], row["top_k"] = p.temperature, p.top_p, p.min_p, p.top_k
        row["seed"], row["stream"] = sequence.seed & UINT64, sequence.stream
        row["repetition"], row["presence"] = p.repetition_penalty, p.presence_penalty
        row["frequency"] = p.frequency_penalty
        for token, bias in p.logit_bias.items():
            self.edits.of(token)["bias"] = bias
        if p.repetition_penalty != 1.0:
            self.edits.see(sequence.prompt_token_ids)
        self._biases = p.logit_bias
        self._held_back = sequence.stop_token_ids if p.min_tokens else ()
        self._may_stop_at = len(sequence.prompt_token_ids) + p.min_tokens
        for token in self._held_back:
            self.edits.of(token)["bias"] = -np.inf
        self.remembers = self.penalized or bool(self._held_back)
        """Whether what may come depends on how much was said, or on what."""

    def at(self, position: int) -> None:
        """Told before its rules are used for the token at a position."""
        if self._held_back and position >= self._may_stop_at:
            for token in self._held_back:
                self.edits.of(token)["bias"] = self._biases.get(token, 0.0)
            self._held_back = ()

    def said(self, token: int) -> None:
        """The output has one more."""
        if self.penalized:
            record = self.edits.of(token)
            record["seen"] = 1
            record["count"] += 1


class RuleBook:
    """Rules by sequence, of those that do not need the host. Owned by one runner; not thread-safe."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._everything = np.full((1, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        self._rules: dict[int, _Rules] = {}

    def add(self, sequence: NewSequence) -> None:
        """A sequence. Raises RequestError (see `check_ids`)."""
        check_ids(sequence.sampling, self._vocab_size)
        self._rules[sequence.sequence_id] = _Rules(sequence, self._vocab_size)

    def remove(self, sequence_id: int) -> None:
        """Forgets a sequence; unknown ones are ignored."""
        self._rules.pop(sequence_id, None)

    def said(self, sequence_id: int, token_id: int) -> None:
        """Told of each token that was chosen by these rules, in order; of unknown sequences it is ignored."""
        rules = self._rules.get(sequence_id)
        if rules is not None and token_id >= 0:
            rules.said(token_id)

    def remembers(self, sequence_id: int) -> bool:
        """Whether the sequence's rules depend on what it has said: only who is told of all tokens knows them."""
        rules = self._rules.get(sequence_id)
        return rules is not None and rules.remembers

    def of(
        self, sequence_ids: Sequence[int], positions: Sequence[int], pending: Sequence[int] | None = None
    ) -> RowRules:
        """The rules of rows of logits. positions: where the sampled tokens will stand. pending: where among the last
        step's tokens those are that were said last, and not told of yet; -1, or None: all were told of."""
        found = [self._rules[sequence_id] for sequence_id in sequence_ids]
        rows = np.concatenate([_NO_ROWS, *(rules.row for rules in found)])
        rows["position"], rows["pending"] = positions, -1
        masks, edits, num_edits = [self._everything], [_NO_EDITS], 0
        for place, rules in enumerate(found):
            rules.at(positions[place])
            if rules.mask is not None:
                rows["mask"][place] = len(masks)
                masks.append(rules.mask[None, :])
            records = rules.edits.records
            if records.size:
                rows["first_edit"][place], rows["num_edits"][place] = num_edits, records.size
                edits.append(records)
                num_edits += records.size
            if rules.penalized and pending is not None:
                rows["pending"][place] = pending[place]
        return RowRules(rows, np.concatenate(masks), np.concatenate(edits))
