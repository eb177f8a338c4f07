"""POST /v1/completions: the bodies of its answers."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from kvarn.request import SequenceOutput
from kvarn.server.events import event
from kvarn.server.generation import Answer, Generation
from kvarn.server.logprobs import completion_logprobs
from kvarn.server.protocol import CompletionRequest
from kvarn.text import Tokenizer


class CompletionAnswer:
    """Builds the bodies of one completion, whole or as a stream; once."""

    def __init__(self, request: CompletionRequest, generation: Generation, tokenizer: Tokenizer, model: str) -> None:
        self._request = request
        self._generation = generation
        self._tokenizer = tokenizer
        self._skip_special = request.skip_special_tokens is not False
        self._head = {
            "id": generation.answer_id, "object": "text_completion", "created": int(time.time()), "model": model,
        }  # fmt: skip
        self._echoes = self._prompt_texts() if request.echo else {}
        """What is still to come before the text of each choice."""
        self._offsets: dict[int, int] = {}
        """Characters of each choice whose logprobs are told."""

    def _prompt_texts(self) -> dict[int, str]:
        n = self._generation.n
        return {
            prompt * n + index: self._tokenizer.decode(request.prompt_token_ids, skip_special_tokens=self._skip_special)
            for prompt, request in enumerate(self._generation.requests)
            for index in range(n)
        }

    def _choice(self, index: int, part: SequenceOutput | Answer) -> dict[str, Any]:
        return {
            "index": index,
            "text": self._echoes.pop(index, "") + part.text,
            "logprobs": None if self._request.logprobs is None else self._logprobs(index, part),
            "finish_reason": None if part.finish_reason is None else part.finish_reason.value,
        }

    def _logprobs(self, index: int, part: SequenceOutput | Answer) -> dict[str, Any]:
        offset = self._offsets.get(index, 0)
        body, self._offsets[index] = completion_logprobs(
            self._tokenizer, part.logprobs, offset, skip_special_tokens=self._skip_special
        )
        return body

    async def whole(self) -> dict[str, Any]:
        """The response body."""
        answers = await self._generation.whole()
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {**self._head, "choices": choices, "usage": self._generation.usage.body()}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The response as events; usage last where it was asked for."""
        async with aclosing(self._generation.stream()) as stream:
            async for deltas in stream:
                out = b"".join(self._chunk([self._choice(*delta)]) for delta in deltas if self._tells(*delta))
                if out:
                    yield out
        if self._request.include_usage:
            yield self._chunk([], self._generation.usage.body())

    def _tells(self, index: int, delta: SequenceOutput) -> bool:
        """Whether there is anything to say; text may be held back."""
        return bool(delta.text or delta.logprobs or delta.finish_reason or index in self._echoes)

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        body: dict[str, Any] = {**self._head, "choices": choices}
        if self._request.include_usage:
            body["usage"] = usage
        return event(body)
