"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from kvarn.request import SequenceOutput
from kvarn.server.generation import Generation, new_id
from kvarn.server.logprobs import chat_logprobs
from kvarn.server.protocol import ChatCompletionRequest
from kvarn.server.sse import event
from kvarn.text import Tokenizer


def prompt_ids(tokenizer: Tokenizer, request: ChatCompletionRequest) -> list[int]:
    """The conversation as token ids. Raises TemplateError, RequestError. Runs in a worker thread."""
    generation_prompt = True if request.add_generation_prompt is None else request.add_generation_prompt
    return tokenizer.encode_chat(
        request.messages,
        add_generation_prompt=generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        template_kwargs=request.chat_template_kwargs or {},
    )


class ChatAnswer:
    """Builds the bodies of one chat completion."""

    def __init__(
        self, request: ChatCompletionRequest, generation: Generation, tokenizer: Tokenizer, model: str
    ) -> None:
        self._request = request
        self._generation = generation
        self._tokenizer = tokenizer
        self._head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model}

    def _logprobs(self, delta: Any) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, delta.logprobs) if self._request.logprobs else None

    async def whole(self) -> dict[str, Any]:
        """The response body."""
        answers = await self._generation.whole()
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(answer),
                "finish_reason": answer.finish_reason.value if answer.finish_reason else None,
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._generation.usage.body()}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, object] | None = None) -> bytes:
        body: dict[str, Any] = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if self._request.include_usage:
            body["usage"] = usage
        return event(body)

    def _choice(self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The response as events: a role for each choice, deltas, finish reasons, usage where it was asked for."""
        async with aclosing(self._generation.stream()) as stream:
            opened = False
            async for deltas in stream:
                out = b""
                if not opened:
                    opened = True
                    first = {"role": "assistant", "content": ""}
                    out = b"".join(
                        self._chunk([self._choice(i, first, None, None)]) for i in range(self._generation.num_choices)
                    )
                out += b"".join(self._delta(index, delta) for index, delta in deltas)
                if out:
                    yield out
        if self._request.include_usage:
            yield self._chunk([], self._generation.usage.body())

    def _delta(self, index: int, delta: SequenceOutput) -> bytes:
        logprobs = self._logprobs(delta) if delta.logprobs else None
        finish = delta.finish_reason.value if delta.finish_reason else None
        if not delta.text and logprobs is None and finish is None:
            return b""
        content = {"content": delta.text} if delta.text or logprobs is not None else {}
        return self._chunk([self._choice(index, content, logprobs, finish)])
