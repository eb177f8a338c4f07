"""How many tokens to guess ahead: the `Speculation` protocol, none, and a fixed number."""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from typing import Protocol

from kvarn.errors import RequestError
from kvarn.request import Request
from kvarn.scheduler.cost import StepShape
from kvarn.scheduler.sequence import Sequence


class Speculation(Protocol):
    """Decides how many tokens are guessed, and how many guesses are verified. Told what came of them."""

    most: int
    """Tokens guessed ahead for one sequence at most; 0: never any, and then nothing but `check` is called."""

    def check(self, request: Request) -> None:
        """Raises RequestError where the request asks for more than is done here. Any thread may call."""
        ...

    def plan(self, ready: ListOf[Sequence], shape: StepShape) -> None:
        """Told which sequences compute one token in the step that is put together, before `wanted` is asked of any.

        shape: of them, without drafts.
        """
        ...

    def wanted(self, sequence: Sequence) -> int:
        """Tokens that a drafter is to propose for the sequence, at most."""
        ...

    def copies(self, sequence: Sequence) -> tuple[int, int]:
        """Tokens that a drafter is to copy at most where it looks up first, and how many are worth more than what it
        guesses otherwise, at least. Asked after `wanted`."""
        ...

    def least_sure(self, sequence: Sequence) -> tuple[float, float]:
        """`least_sure` and `guess_cost` of a `ScheduledSequence`. Asked after `wanted`."""
        ...

    def choose(self, drafted: ListOf[Sequence], shape: StepShape, room: int) -> list[int]:
        """For each of those that have a draft, how many of its tokens to verify in this step; `room` in all at most.

        shape: of the sequences that compute one token, these among them, without drafts.
        """
        ...

    def compare(
        self, sequence: Sequence, draft: tuple[int, ...], parents: tuple[int, ...], tokens: ListOf[int]
    ) -> None:
        """Told which tokens came in the place of a draft, of which some may have been verified, or none."""
        ...

    def proposed(self, came: ListOf[tuple[int, int]], seconds: float, prepare_seconds: float) -> None:
        """Told what came of asking for guesses in a step: for each sequence of which any were asked how many, and how
        many came; not of those whose guesses were copied. seconds: that making them took; prepare_seconds: and getting
        ready for it."""
        ...

    def ended(self, sequence: Sequence) -> None:
        """Told of a sequence that has said its last token."""
        ...

    def timed(self, shape: StepShape, seconds: float) -> None:
        """Told what each step took, without guessing."""
        ...


def limit(most: int, sequence: Sequence) -> int:
    """How many of `most` guesses the sequence may have: as its request says."""
    asked = sequence.sampling.num_speculative_tokens
    return most if asked is None else min(asked, most)


def check_asked(request: Request, most: int) -> None:
    """Raises RequestError for more guesses than `most`."""
    asked = request.sampling.num_speculative_tokens
    if asked is not None and asked > most:
        raise RequestError(
            f"num_speculative_tokens must be 0 to {most}, what this server was started with (--speculative), "
            f"not {asked}",
            field="num_speculative_tokens",
        )


class NoSpeculation:
    """Nothing is guessed."""

    most = 0

    def check(self, request: Request) -> None:
        """Raises RequestError for a request that wants guesses, rather than to ignore it."""
        asked = request.sampling.num_speculative_tokens
        if asked:
            raise RequestError(
                f"num_speculative_tokens must be 0, not {asked}: this server runs without speculative decoding "
                "(--speculative)",
                field="num_speculative_tokens",
            )

    def wanted(self, sequence: Sequence) -> int:
        """None."""
        del sequence
        return 0

    def copies(self, sequence: Sequence) -> tuple[int, int]:
        """None."""
        del sequence
        return 0, 0

    def least_sure(self, sequence: Sequence) -> tuple[float, float]:
        """None."""
        del sequence
        return 0.0, 0.0

    def choose(self, drafted: ListOf[Sequence], shape: StepShape, room: int) -> list[int]:
        """None."""
        del shape, room
        return [0] * len(drafted)

    def compare(
        self, sequence: Sequence, draft: tuple[int, ...], parents: tuple[int, ...], tokens: ListOf[int]
    ) -> None:
        """Learns nothing."""

    def plan(self, ready: ListOf[Sequence], shape: StepShape) -> None:
        """Plans nothing."""

    def proposed(self, came: ListOf[tuple[int, int]], seconds: float, prepare_seconds: float) -> None:
        """Learns nothing."""

    def ended(self, sequence: Sequence) -> None:
        """Learns nothing."""

    def timed(self, shape: StepShape, seconds: float) -> None:
        """Learns nothing."""


class FixedSpeculation(NoSpeculation):
    """The same number for every sequence in every step, as far as there is room; learns nothing."""

    def __init__(self, k: int, copies: int = 0, p_min: float = 0.0) -> None:
        """k: tokens guessed ahead. copies: and where some are looked up first, so many of those. p_min: see
        `SpeculativeConfig`."""
        self.most = k
        self._copies = copies
        self._p_min = p_min

    def check(self, request: Request) -> None:
        """See `Speculation`."""
        check_asked(request, self.most)

    def wanted(self, sequence: Sequence) -> int:
        """See `Speculation`."""
        return limit(self.most, sequence)

    def copies(self, sequence: Sequence) -> tuple[int, int]:
        """See `Speculation`. Any is taken."""
        return limit(self._copies, sequence), 0

    def least_sure(self, sequence: Sequence) -> tuple[float, float]:
        """As the settings say, for each sequence by itself."""
        del sequence
        return self._p_min, 0.0

    def choose(self, drafted: ListOf[Sequence], shape: StepShape, room: int) -> list[int]:
        """All; where there is less room, an equal share for each."""
        del shape
        counts: list[int] = []
        for place, sequence in enumerate(drafted):
            counts.append(min(len(sequence.draft), (room - sum(counts)) // (len(drafted) - place)))
        return counts
