"""`BeamGeneration`: the answers of one HTTP request, found by beam search."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

from kvarn.engine import AsyncLLM
from kvarn.engine.beam import BeamParams, beam_text, new_search
from kvarn.errors import OverloadError, RequestError
from kvarn.request import SamplingParams, SequenceOutput
from kvarn.server.caller import Caller
from kvarn.server.generation import Answer, Generation


class BeamGeneration(Generation):
    """A `Generation` whose answers are the best of a search for each prompt, one prompt after the other."""

    def __init__(
        self,
        beams: BeamParams,
        llm: AsyncLLM,
        prompts: Iterable[Sequence[int]],
        sampling: SamplingParams,
        answer_id: str,
        caller: Caller,
        *,
        priority: int | None = None,
        cache_salt: str = "",
        refusal: Callable[[RequestError], Exception] = lambda error: error,
    ) -> None:
        """As `Generation`; also raises RequestError for parameters that beam search does not go with."""
        super().__init__(
            llm, prompts, sampling, answer_id, caller, priority=priority, cache_salt=cache_salt, refusal=refusal
        )
        self._beams = beams
        for request in self.requests:
            new_search(sampling, beams, len(request.prompt_token_ids), llm.tokenizer.eos_token_ids)

    async def whole(self) -> list[Answer]:
        """All answers, complete. Fewer than `num_choices` where the model has no more tokens to choose among."""
        try:
            with self._in_flight() as load:
                found = [await self._search(place) for place in range(len(self.requests))]
                load.gained(self.usage.completion)
                return [answer for answers in found for answer in answers]
        except RequestError as error:
            raise error if isinstance(error, OverloadError) else self._refusal(error) from None

    async def _search(self, place: int) -> list[Answer]:
        request, tokenizer = self.requests[place], self._llm.tokenizer
        found = await self._llm.beam_search(request, self._beams)
        self.usage.cached += found.num_cached_tokens
        self.usage.completion += sum(len(beam.token_ids) for beam in found.beams)
        ids, sampling = request.prompt_token_ids, request.sampling
        return [
            Answer(beam_text(tokenizer, ids, beam, sampling), list(beam.token_ids), finish_reason=beam.end)
            for beam in found.beams
        ]

    def stream(self) -> AsyncGenerator[list[tuple[int, SequenceOutput]], None]:
        """Which beams are best is known at the end: requests for a stream are refused before they come here."""
        raise ValueError("a beam search has no stream")
