"""`GrammarMasks`: which tokens the grammars of a step's sequences allow, computed while the model computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvarn.draft_tree import way
from kvarn.grammar.compiler import CompiledGrammar
from kvarn.grammar.vocabulary import cause
from kvarn.request import Grammar
from kvarn.step import FailedSequence, NewSequence, SampledToken, ScheduledSequence

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from llguidance import LLMatcher


@dataclass(slots=True)
class StepMasks:
    """bits: uint32[M, ceil(vocab / 32)], of the rows of logits that have a grammar; rows: int32[R], by row of the
    logits the row of `bits`, -1 for none. failed: sequences whose grammar gave up; all is allowed to them."""

    bits: NDArray[np.uint32]
    rows: NDArray[np.int32]
    failed: list[FailedSequence] = field(default_factory=list)


class GrammarMasks:
    """The matchers of the sequences that have a grammar. Owned by one runner; not thread-safe.

    It costs nothing in steps in which no such sequence samples. A matcher stands where the sequence's last known token
    is; what is only guessed is tried and rolled back. Preemption does not end a matcher's life.
    """

    def __init__(
        self,
        find: Callable[[Grammar], CompiledGrammar | None] = lambda _grammar: None,
        vocab_size: int = 0,
        ends: Iterable[int] = (),
    ) -> None:
        """find: a compiled grammar. vocab_size: width of the logits. ends: tokens that end an answer.

        Without arguments no sequence may have a grammar.
        """
        self._find = find
        self._words = -(-vocab_size // 32)
        self._ends = frozenset(ends)
        self._matchers: dict[int, LLMatcher] = {}
        self._behind: dict[int, list[int]] = {}
        """Tokens that a matcher has still to take in, which is done beside the model where nobody asks before."""
        self._thread: ThreadPoolExecutor | None = None
        self.seconds = 0.0
        """Spent on masks, beside the model."""
        self.waited_seconds = 0.0
        """For which steps waited for them."""

    @property
    def active(self) -> bool:
        """Whether any sequence has a grammar."""
        return bool(self._matchers)

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._matchers

    def add(self, new: NewSequence) -> None:
        """Takes a sequence in, once; ignores those without a grammar. Raises LookupError where it is not compiled."""
        grammar = new.sampling.grammar
        if grammar is None:
            return
        compiled = self._find(grammar)
        if compiled is None:
            raise LookupError(f"the grammar of sequence {new.sequence_id} is not compiled")
        self._matchers[new.sequence_id] = compiled.matcher()

    def remove(self, sequence_id: int) -> None:
        """Forgets a sequence; unknown ones are ignored."""
        self._matchers.pop(sequence_id, None)
        self._behind.pop(sequence_id, None)

    def begin(self, parts: Sequence[ScheduledSequence]) -> Future[StepMasks] | None:
        """Starts computing the masks for parts that sample, each with a row for its last token and for each of its
        draft. None where none of them has a grammar. Nothing else may be called before its result is there."""
        if not self._matchers or not any(part.sequence_id in self._matchers for part in parts):
            return None
        if self._thread is None:
            from concurrent.futures import ThreadPoolExecutor

            self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvarn-masks")
        return self._thread.submit(self._compute, parts)

    def finish(self, pending: Future[StepMasks]) -> StepMasks:
        """Waits for the masks."""
        started = time.perf_counter()
        masks = pending.result()
        self.waited_seconds += time.perf_counter() - started
        return masks

    def advance(self, sampled: Sequence[SampledToken]) -> None:
        """Told of sampled tokens."""
        for token in sampled:
            if token.sequence_id in self._matchers and token.token_id not in self._ends:
                self._behind.setdefault(token.sequence_id, []).append(token.token_id)

    def _at(self, sequence_id: int) -> LLMatcher:
        """The sequence's matcher, where its last token is. It may have given up."""
        matcher = self._matchers[sequence_id]
        behind = self._behind.pop(sequence_id, None)
        if behind:
            matcher.consume_tokens(behind)
        return matcher

    def forced(self, sequence_id: int, most: int) -> tuple[int, ...]:
        """The next tokens of a sequence with a grammar that leaves no choice of them, at most `most`."""
        matcher = self._at(sequence_id)
        return () if matcher.is_error() else tuple(matcher.compute_ff_tokens()[:most])

    def allowed(self, sequence_id: int, draft: Sequence[int], parents: Sequence[int]) -> set[int]:
        """The places of a draft's tokens that the sequence's grammar allows, an end of the text where it may be among
        them."""
        matcher, places = self._at(sequence_id), set[int]()
        if matcher.is_error():
            return places
        for leaf in set(range(len(draft))).difference(parents):
            along = way(parents, leaf)
            places.update(along[: matcher.validate_tokens([draft[place] for place in along])])
        return places

    def close(self) -> None:
        """Ends the thread. Idempotent."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _compute(self, parts: Sequence[ScheduledSequence]) -> StepMasks:
        started = time.perf_counter()
        mine = [(part, self._at(part.sequence_id)) for part in parts if part.sequence_id in self._matchers]
        bits = np.empty((sum(1 + len(part.draft) for part, _ in mine), self._words), np.uint32)
        done: dict[int, dict[int, int]] = {}
        failed: list[FailedSequence] = []
        used, address = 0, bits.ctypes.data
        for part, matcher in mine:
            places = self._compute_one(matcher, part, bits[used:], address + used * bits.strides[0])
            if matcher.is_error() or not bits[used].any():
                failed.append(self._failure(part.sequence_id, matcher))
                places = []
            done[part.sequence_id] = {place: used + place for place in places}
            used += 1 + len(part.draft)
        rows = [done.get(part.sequence_id, {}).get(n, -1) for part in parts for n in range(1 + len(part.draft))]
        self.seconds += time.perf_counter() - started
        return StepMasks(bits, np.array(rows, np.int32), failed)

    def _compute_one(
        self, matcher: LLMatcher, part: ScheduledSequence, bits: NDArray[np.uint32], address: int
    ) -> list[int]:
        """Fills rows of bits, which begin at the address: the first for the matcher's place, the others for after each
        token of the draft; returns which. Those after a token that the grammar forbids, or that ends the text, are not
        looked at.
        """
        size = bits.strides[0]
        matcher.unsafe_compute_mask_ptr(address, size)
        done, behind = [0], list[int]()
        for place, (token, parent) in enumerate(zip(part.draft, part.parents, strict=True)):
            if matcher.is_error():
                break
            if parent + 1 not in done or token in self._ends or not _allows(bits[parent + 1], token):
                continue
            if not _go(matcher, behind, way(part.parents, place), part.draft):
                break
            matcher.unsafe_compute_mask_ptr(address + (place + 1) * size, size)
            done.append(place + 1)
        if behind:
            matcher.rollback(len(behind))
        return done

    @staticmethod
    def _failure(sequence_id: int, matcher: LLMatcher) -> FailedSequence:
        said = cause(matcher) or "it allows no token here"
        return FailedSequence(sequence_id, f"the grammar is too complex: {said}")


def _allows(mask: NDArray[np.uint32], token: int) -> bool:
    return bool(mask[token >> 5] >> np.uint32(token & 31) & 1)


def _go(matcher: LLMatcher, behind: list[int], along: list[int], draft: Sequence[int]) -> bool:
    """Takes the matcher from behind some tokens of a draft, by place, to behind those `along` another way; False where
    it gives up. behind: is changed to where it stands."""
    common = 0
    while common < min(len(behind), len(along)) and behind[common] == along[common]:
        common += 1
    if len(behind) > common:
        matcher.rollback(len(behind) - common)
        del behind[common:]
    for place in along[common:]:
        if not matcher.consume_token(draft[place]):
            return False
        behind.append(place)
    return True
