"""POST /v1/responses: the bodies of its answers, in the form of OpenAI's responses."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from kvarn.request import FinishReason, SequenceOutput
from kvarn.server.asking import Chat
from kvarn.server.errors import to_api_error
from kvarn.server.generation import Usage
from kvarn.server.logprobs import chat_logprobs
from kvarn.server.protocol.responses import ResponsesRequest
from kvarn.server.response_items import OutputItems


class ResponseAnswer:
    """Builds one response, whole or as a stream of typed events; once."""

    def __init__(self, request: ResponsesRequest, chat: Chat) -> None:
        self._generation = chat.generation
        (self._voice,) = chat.voices()
        self._tokenizer = chat.tokenizer
        self._output = OutputItems()
        self._with_logprobs = request.with_logprobs
        self._logprobs: list[dict[str, Any]] = []
        """Of tokens whose text has not come yet."""
        self._thoughts = None if chat.thoughts is None else chat.thoughts.tokens(chat.tokenizer)
        self._num_thought = 0
        """Tokens of thoughts."""
        self._body = {
            "id": chat.generation.answer_id, "object": "response", "created_at": int(time.time()),
            "status": "in_progress", "background": False, "error": None, "incomplete_details": None,
            "instructions": request.instructions, "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {}, "model": chat.model, "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False, "previous_response_id": None,
            "store": False, "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": {"type": "text"}, **(request.text or {})}, "tool_choice": request.tool_choice or "auto",
            "tools": [{"strict": True, "parameters": None, **tool} for tool in request.tools or ()],
            "top_p": 1.0 if request.top_p is None else request.top_p, "truncation": "disabled",
            "reasoning": {"effort": None, "summary": None, **(request.reasoning or {})},
            "top_logprobs": request.top_logprobs or 0,
        }  # fmt: skip

    async def whole(self) -> dict[str, Any]:
        """The response body."""
        reason: FinishReason | None = None
        async with aclosing(self._generation.stream()) as stream:
            async for deltas in stream:
                for _, part in deltas:
                    reason = part.finish_reason
                    self._take(part)
        return self._ended(reason)

    def _take(self, part: SequenceOutput) -> bytes:
        """The events of what a step has added."""
        thought = [self._thoughts is not None and self._thoughts.is_thought(token) for token in part.token_ids]
        self._num_thought += sum(thought)
        if self._with_logprobs:
            said = [entry for entry, left_out in zip(part.logprobs, thought, strict=True) if not left_out]
            self._logprobs += chat_logprobs(self._tokenizer, said)["content"]
        out = b""
        for piece in self._voice.pieces(part.text, ended=part.finish_reason is not None):
            is_text = isinstance(piece, str)
            out += self._output.take(piece, self._logprobs if is_text else [])
            self._logprobs = [] if is_text else self._logprobs
        if part.finish_reason is not None:
            self._output.late(self._logprobs)
        return out

    def _ended(self, reason: FinishReason | None) -> dict[str, Any]:
        """The body once nothing more comes."""
        cut = reason is FinishReason.LENGTH
        self._output.close(cut=cut)
        return {
            **self._body,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output.items,
            "usage": _usage(self._generation.usage, self._num_thought),
        }

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The response as events: itself, its items as they grow, and itself again, complete or failed."""
        events = self._output
        out = events.event("response.created", response=self._body)
        out += events.event("response.in_progress", response=self._body)
        reason: FinishReason | None = None
        begun = False
        try:
            async with aclosing(self._generation.stream()) as stream:
                async for deltas in stream:
                    for _, part in deltas:
                        reason = part.finish_reason
                        out += self._take(part)
                    if out:
                        begun = True
                        yield out
                    out = b""
        except Exception as error:
            if not begun:  # it gets a proper status
                raise
            told = to_api_error(error)
            failure = {"code": "server_error", "message": told.told}
            yield events.event("response.failed", response={**self._body, "status": "failed", "error": failure})
            return
        closed = events.close(cut=reason is FinishReason.LENGTH)
        body = self._ended(reason)
        yield closed + events.event(f"response.{body['status']}", response=body)


def _usage(usage: Usage, num_thought: int) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": num_thought},
        "total_tokens": usage.prompt + usage.completion,
    }
