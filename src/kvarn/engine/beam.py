"""Beam search: the likeliest continuations that are found by keeping the best few at each length.

`BeamSearch` decides and does no work itself. Whoever drives it (`AsyncLLM`, `LLM`) asks the engine what may follow each
open beam, one token at a time: each beam is the prompt of a request of its own, whose keys and values the prefix cache
has but for the last token, shared between beams as far as they agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvarn.errors import RequestError
from kvarn.request import MAX_LOGPROBS, FinishReason, SamplingParams
from kvarn.text import IncrementalDetokenizer, Tokenizer

MAX_BEAM_WIDTH = MAX_LOGPROBS // 2
"""A beam is extended by the 2 * width likeliest tokens, so that ends of the text leave width others."""


APART = (
    "min_tokens", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "allowed_token_ids", "bad_words", "stop", "logprobs", "prompt_logprobs", "grammar",
)  # fmt: skip
"""Parameters that have no place in a search: its beams are the model's own likeliest."""


@dataclass(frozen=True, slots=True)
class BeamParams:
    """How to search. Raises RequestError naming the field on construction."""

    width: int
    """Beams that are kept."""
    length_penalty: float = 1.0
    """A beam's score is its logprob / (tokens of prompt and beam, but for an end of the text) ** this, as vLLM has it:
    above 0 longer ones are favoured."""

    def __post_init__(self) -> None:
        if not 1 <= self.width <= MAX_BEAM_WIDTH:
            message = f"the beam width must be between 1 and {MAX_BEAM_WIDTH}, not {self.width}"
            raise RequestError(message, field="best_of")
        if not -10 <= self.length_penalty <= 10:
            message = f"length_penalty must be between -10 and 10, not {self.length_penalty}"
            raise RequestError(message, field="length_penalty")

    @property
    def extension(self) -> SamplingParams:
        """Of a request that asks what may follow a beam."""
        most = 2 * self.width
        return SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=most, num_speculative_tokens=0)


@dataclass(frozen=True, slots=True)
class Beam:
    """A continuation of the prompt."""

    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    """Of all its tokens."""
    finish_reason: FinishReason | None = None
    """STOP: its last token ends the text."""

    @property
    def end(self) -> FinishReason:
        """Why it ended; only of one that has."""
        assert self.finish_reason is not None
        return self.finish_reason


@dataclass(frozen=True, slots=True)
class BeamResult:
    """What a search found, the best first."""

    beams: list[Beam]
    num_cached_tokens: int
    """Of the prompt, found in the prefix cache when the search began."""


class BeamSearch:
    """One search. As long as there are `open` beams, `take` what may follow each of them; then there are the `best`."""

    def __init__(self, params: BeamParams, num_prompt_tokens: int, max_tokens: int, ends: Iterable[int]) -> None:
        """ends: tokens that end a beam."""
        self._params = params
        self._num_prompt_tokens = num_prompt_tokens
        self._max_tokens = max_tokens
        self._ends = frozenset(ends)
        self._ended: list[Beam] = []
        self.open = [Beam()]

    def take(self, candidates: Sequence[Sequence[tuple[int, float]]]) -> None:
        """candidates: for each open beam the likeliest tokens after it with their logprobs."""
        grown: list[Beam] = []
        for beam, likeliest in zip(self.open, candidates, strict=True):
            for token, logprob in likeliest:
                ends = token in self._ends
                reason = FinishReason.STOP if ends else None
                longer = Beam((*beam.token_ids, token), beam.logprob + logprob, reason)
                (self._ended if ends else grown).append(longer)
        self._ended = self._sorted(self._ended)[: self._params.width]
        self.open = self._sorted(grown)[: self._params.width]
        if self.open and len(self.open[0].token_ids) >= self._max_tokens:
            self._ended += [Beam(beam.token_ids, beam.logprob, FinishReason.LENGTH) for beam in self.open]
            self.open = []
        elif self._decided():
            self.open = []

    def best(self, count: int) -> list[Beam]:
        """The best of all beams that have ended, at most `count`, the best first."""
        return self._sorted(self._ended)[:count]

    def score(self, beam: Beam) -> float:
        """By which beams are compared."""
        return self._score(beam.logprob, len(beam.token_ids) - (beam.finish_reason is FinishReason.STOP))

    def _score(self, logprob: float, num_tokens: int) -> float:
        return logprob / float(self._num_prompt_tokens + num_tokens) ** self._params.length_penalty

    def _sorted(self, beams: list[Beam]) -> list[Beam]:
        return sorted(beams, key=lambda beam: (-self.score(beam), beam.token_ids))

    def _decided(self) -> bool:
        """Whether no open beam can get among the best any more: its logprob will not rise."""
        if len(self._ended) < self._params.width:
            return False
        worst = self.score(self._ended[-1])
        lengths = {len(beam.token_ids) for beam in self.open} | {self._max_tokens}
        return all(self._score(beam.logprob, length) < worst for beam in self.open for length in lengths)


def new_search(
    sampling: SamplingParams, params: BeamParams, num_prompt_tokens: int, eos_token_ids: tuple[int, ...]
) -> BeamSearch:
    """The search that a request with these parameters asks for. Raises RequestError naming what does not go with it."""
    plain = SamplingParams()
    for name in APART:
        if getattr(sampling, name) != getattr(plain, name) and not (name == "top_k" and sampling.top_k == -1):
            raise RequestError(f"{name} does not go with beam search, which takes the likeliest", field=name)
    if sampling.max_tokens is None:
        raise RequestError("beam search needs max_tokens", field="max_tokens")
    if sampling.n > params.width:
        message = f"n ({sampling.n}) must be at most the beam width ({params.width})"
        raise RequestError(message, field="n")
    ends = sampling.stop_token_ids + (() if sampling.ignore_eos else eos_token_ids)
    return BeamSearch(params, num_prompt_tokens, sampling.max_tokens, ends)


def beam_text(tokenizer: Tokenizer, prompt_ids: Sequence[int], beam: Beam, sampling: SamplingParams) -> str:
    """A beam's text, without the token that ended it unless `include_stop_str_in_output`."""
    text = IncrementalDetokenizer(tokenizer, prompt_ids=prompt_ids, skip_special_tokens=sampling.skip_special_tokens)
    untold = beam.finish_reason is FinishReason.STOP and not sampling.include_stop_str_in_output
    tokens = beam.token_ids[:-1] if untold else beam.token_ids
    return "".join(map(text.append, tokens)) + text.finish()
