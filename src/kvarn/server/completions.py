"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from kvarn.request import SequenceOutput
from kvarn.server.errors import ApiError
from kvarn.server.generation import Generation, new_id
from kvarn.server.logprobs import completion_logprobs
from kvarn.server.protocol import MAX_PROMPTS, CompletionRequest
from kvarn.server.sse import event
from kvarn.text import Tokenizer


def prompt_ids(tokenizer: Tokenizer, request: CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt. Raises ApiError naming it. Runs in a worker thread."""
    given = request.prompt
    single = isinstance(given, str) or (given and isinstance(given[0], int))
    prompts: list[Any] = [given] if single else list(given)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise ApiError(400, f"prompt must hold 1 to {MAX_PROMPTS} prompts, not {len(prompts)}", param="prompt")
    return [tokenizer.encode(p, add_special_tokens=True) if isinstance(p, str) else list(p) for p in prompts]


class CompletionAnswer:
    """Builds the bodies of one completion."""

    def __init__(self, request: CompletionRequest, generation: Generation, tokenizer: Tokenizer, model: str) -> None:
        self._request = request
        self._generation = generation
        self._tokenizer = tokenizer
        self._head = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": model}
        self._offsets: dict[int, int] = {}

    def _choice(self, index: int, part: Any, finish: str | None) -> dict[str, Any]:
        logprobs = None
        if self._request.logprobs is not None:
            offset = self._offsets.get(index, 0)
            logprobs = completion_logprobs(self._tokenizer, part.logprobs, offset)
            if logprobs["tokens"]:
                self._offsets[index] = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
        return {"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": finish}

    async def whole(self) -> dict[str, Any]:
        """The response body."""
        answers = await self._generation.whole()
        choices = [
            self._choice(index, answer, answer.finish_reason.value if answer.finish_reason else None)
            for index, answer in enumerate(answers)
        ]
        return {**self._head, "choices": choices, "usage": self._generation.usage.body()}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, object] | None = None) -> bytes:
        body: dict[str, Any] = {**self._head, "choices": choices}
        if self._request.include_usage:
            body["usage"] = usage
        return event(body)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The response as events; usage last where it was asked for."""
        async with aclosing(self._generation.stream()) as stream:
            async for deltas in stream:
                out = b"".join(self._delta(index, delta) for index, delta in deltas)
                if out:
                    yield out
        if self._request.include_usage:
            yield self._chunk([], self._generation.usage.body())

    def _delta(self, index: int, delta: SequenceOutput) -> bytes:
        finish = delta.finish_reason.value if delta.finish_reason else None
        if not delta.text and not delta.logprobs and finish is None:
            return b""
        return self._chunk([self._choice(index, delta, finish)])
