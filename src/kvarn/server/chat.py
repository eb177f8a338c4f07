"""POST /v1/chat/completions: the bodies of its answers."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from kvarn.request import SequenceOutput
from kvarn.server.asking import Chat
from kvarn.server.events import event
from kvarn.server.generation import Answer
from kvarn.server.logprobs import chat_logprobs, prompt_logprobs
from kvarn.server.protocol import ChatCompletionRequest


class ChatAnswer:
    """Builds the bodies of one chat completion, whole or as a stream; once."""

    def __init__(self, request: ChatCompletionRequest, chat: Chat) -> None:
        self._request = request
        self._generation = chat.generation
        self._tokenizer = chat.tokenizer
        self._voices = chat.voices()
        self._head = {"id": chat.generation.answer_id, "created": int(time.time()), "model": chat.model}
        self._first: dict[str, Any] = {}
        """What only the first event of a stream has."""

    async def whole(self) -> dict[str, Any]:
        """The response body."""
        answers = await self._generation.whole()
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "refusal": None, **voice.whole(answer.text)},
                "logprobs": self._logprobs(answer) if self._request.logprobs else None,
                "finish_reason": voice.finish_reason(answer.finish_reason),
                **self._ids(answer),
            }
            for index, (answer, voice) in enumerate(zip(answers, self._voices, strict=True))
        ]
        head = {**self._head, **self._prompt_ids(), **self._prompt_logprobs()}
        return {**head, "object": "chat.completion", "choices": choices, "usage": self._generation.usage.body()}

    def _logprobs(self, part: SequenceOutput | Answer) -> dict[str, Any]:
        as_ids = bool(self._request.return_tokens_as_token_ids)
        return chat_logprobs(self._tokenizer, part.logprobs, as_ids=as_ids)

    def _prompt_ids(self) -> dict[str, Any]:
        """As vLLM tells them, where they are asked for."""
        if not self._request.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self._generation.requests[0].prompt_token_ids)}

    def _prompt_logprobs(self) -> dict[str, Any]:
        if self._request.prompt_logprobs is None:
            return {}
        said, as_ids = self._generation.prompt_logprobs.get(0, ()), bool(self._request.return_tokens_as_token_ids)
        return {"prompt_logprobs": prompt_logprobs(self._tokenizer, said, as_ids)}

    def _ids(self, part: SequenceOutput | Answer) -> dict[str, Any]:
        return {"token_ids": list(part.token_ids)} if self._request.return_token_ids else {}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The response as events: a role for each choice, deltas, finish reasons, usage where it was asked for."""
        self._first = self._prompt_ids()
        out = b"".join(self._opening(index) for index in range(self._generation.num_choices))
        async with aclosing(self._generation.stream()) as stream:
            async for deltas in stream:
                out += b"".join(self._delta(index, delta) for index, delta in deltas)
                if out:
                    yield out
                out = b""
        if self._request.include_usage:
            yield self._chunk([], self._generation.usage.body())

    def _opening(self, index: int) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _delta(self, index: int, part: SequenceOutput) -> bytes:
        voice = self._voices[index]
        logprobs = self._logprobs(part) if part.logprobs else None
        deltas = voice.deltas(part.text, ended=part.finish_reason is not None)
        finish = voice.finish_reason(part.finish_reason)
        ids = self._ids(part)
        if not deltas and (logprobs is not None or ids.get("token_ids")):
            deltas = [{"content": ""}]
        if not deltas and finish is not None:
            deltas = [{}]
        chunks = b""
        for place, delta in enumerate(deltas):
            last = place == len(deltas) - 1
            choice = {"index": index, "delta": delta, "logprobs": logprobs if place == 0 else None}
            if place == 0:
                choice |= ids
            chunks += self._chunk([{**choice, "finish_reason": finish if last else None}])
        return chunks

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        body: dict[str, Any] = {**self._head, **self._first, "object": "chat.completion.chunk", "choices": choices}
        self._first = {}
        if self._request.include_usage:
            body["usage"] = self._generation.usage.body() if self._request.continuous_usage else usage
        return event(body)
