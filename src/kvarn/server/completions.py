"""POST /v1/completions: the bodies of its answers."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from kvarn.request import FinishReason, SequenceOutput, TokenLogprob
from kvarn.server.events import event
from kvarn.server.generation import Answer, Generation
from kvarn.server.logprobs import completion_logprobs, prompt_logprobs
from kvarn.server.protocol import CompletionRequest
from kvarn.text import Tokenizer


class CompletionAnswer:
    """Builds the bodies of one completion, whole or as a stream; once."""

    def __init__(self, request: CompletionRequest, generation: Generation, tokenizer: Tokenizer, model: str) -> None:
        self._request = request
        self._generation = generation
        self._tokenizer = tokenizer
        self._skip_special = request.skip_special_tokens is not False
        self._as_ids = bool(request.return_tokens_as_token_ids)
        self._head = {
            "id": generation.answer_id, "object": "text_completion", "created": int(time.time()), "model": model,
        }  # fmt: skip
        self._n = request.num_answers
        self._begun: set[int] = set()
        """Choices of which something was told."""
        self._offsets: dict[int, int] = {}
        """Characters of each choice whose logprobs are told."""

    def _choice(self, index: int, part: SequenceOutput | Answer) -> dict[str, Any]:
        if self._request.echoes_only:
            part = Answer(finish_reason=FinishReason.LENGTH)
        first, prompt = index not in self._begun, index // self._n
        self._begun.add(index)
        echo = first and bool(self._request.echo)
        return {
            "index": index,
            "text": self._prompt_text(prompt) + part.text if echo else part.text,
            "logprobs": None if self._request.logprobs is None else self._logprobs(index, part, echo),
            "finish_reason": None if part.finish_reason is None else part.finish_reason.value,
            **self._ids(prompt, part, first),
            **self._prompt_logprobs(prompt),
        }

    def _prompt_text(self, prompt: int) -> str:
        ids = self._generation.requests[prompt].prompt_token_ids
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)

    def _ids(self, prompt: int, part: SequenceOutput | Answer, first: bool) -> dict[str, Any]:
        """As vLLM tells them, where they are asked for: those of the prompt once for each choice."""
        if not self._request.return_token_ids:
            return {}
        ids = list(self._generation.requests[prompt].prompt_token_ids) if first else None
        return {"prompt_token_ids": ids, "token_ids": list(part.token_ids)}

    def _logprobs(self, index: int, part: SequenceOutput | Answer, echo: bool) -> dict[str, Any]:
        """echo: those of the prompt, too."""
        said: list[TokenLogprob | int] = list(part.logprobs)
        if echo:
            prompt, most = index // self._n, self._request.logprobs or 0
            of_prompt = self._generation.prompt_logprobs.get(prompt, ())
            first = self._generation.requests[prompt].prompt_token_ids[0]
            said = [first, *(replace(item, top=item.top[:most]) for item in of_prompt), *said]
        body, self._offsets[index] = completion_logprobs(
            self._tokenizer,
            said,
            self._offsets.get(index, 0),
            skip_special_tokens=self._skip_special,
            as_ids=self._as_ids,
        )
        return body

    def _prompt_logprobs(self, prompt: int) -> dict[str, Any]:
        most = self._request.prompt_logprobs
        if most is None:
            return {}
        said = [replace(item, top=item.top[:most]) for item in self._generation.prompt_logprobs.get(prompt, ())]
        return {"prompt_logprobs": prompt_logprobs(self._tokenizer, said, self._as_ids)}

    async def whole(self) -> dict[str, Any]:
        """The response body."""
        answers = await self._generation.whole()
        if self._request.chooses:
            answers = _best(answers, self._generation.n, self._n)
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The response as events; usage last where it was asked for."""
        async with aclosing(self._generation.stream()) as stream:
            async for deltas in stream:
                out = b"".join(self._chunk([self._choice(*delta)]) for delta in deltas if self._tells(*delta))
                if out:
                    yield out
        if self._request.include_usage:
            yield self._chunk([], self._usage())

    def _tells(self, index: int, delta: SequenceOutput) -> bool:
        """Whether there is anything to say; text may be held back."""
        news = delta.text or delta.logprobs or delta.finish_reason or (self._request.echo and index not in self._begun)
        return bool(news or (self._request.return_token_ids and delta.token_ids))

    def _usage(self) -> dict[str, object]:
        if self._request.echoes_only:
            self._generation.usage.completion = 0
        return self._generation.usage.body()

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        body: dict[str, Any] = {**self._head, "choices": choices}
        if self._request.include_usage:
            body["usage"] = self._usage() if self._request.continuous_usage else usage
        return event(body)


def _best(answers: Sequence[Answer], made: int, told: int) -> list[Answer]:
    """Of each prompt's answers the best, by the mean logprob of their tokens (as OpenAI's `best_of` chose).

    made, told: answers for each prompt.
    """
    prompts = (answers[start : start + made] for start in range(0, len(answers), made))
    return [answer for own in prompts for answer in sorted(own, key=_mean_logprob, reverse=True)[:told]]


def _mean_logprob(answer: Answer) -> float:
    return sum(item.logprob for item in answer.logprobs) / max(1, len(answer.logprobs))
