"""POST /v1/responses: the bodies of its answers, in the form of OpenAI's responses."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from kvarn.request import FinishReason
from kvarn.server.asking import Chat
from kvarn.server.errors import to_api_error
from kvarn.server.events import typed_event
from kvarn.server.generation import Usage
from kvarn.server.protocol.responses import ResponsesRequest
from kvarn.server.tools import CallDelta


class ResponseAnswer:
    """Builds one response, whole or as a stream of typed events; once."""

    def __init__(self, request: ResponsesRequest, chat: Chat) -> None:
        self._generation = chat.generation
        (self._voice,) = chat.voices()
        self._output = OutputItems()
        self._body = {
            "id": chat.generation.answer_id, "object": "response", "created_at": int(time.time()),
            "status": "in_progress", "background": False, "error": None, "incomplete_details": None,
            "instructions": request.instructions, "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {}, "model": chat.model, "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False, "previous_response_id": None,
            "store": False, "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": {"type": "text"}, **(request.text or {})}, "tool_choice": request.tool_choice or "auto",
            "tools": [{"strict": True, "parameters": None, **tool} for tool in request.tools or ()],
            "top_p": 1.0 if request.top_p is None else request.top_p, "truncation": "disabled", "usage": None,
        }  # fmt: skip

    async def whole(self) -> dict[str, Any]:
        """The response body."""
        (answer,) = await self._generation.whole()
        for piece in self._voice.pieces(answer.text, ended=True):
            self._output.take(piece)
        return self._ended(answer.finish_reason)

    def _ended(self, reason: FinishReason | None) -> dict[str, Any]:
        """The body once nothing more comes."""
        cut = reason is FinishReason.LENGTH
        self._output.close(cut=cut)
        return {
            **self._body,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output.items,
            "usage": _usage(self._generation.usage),
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
                        for piece in self._voice.pieces(part.text, ended=reason is not None):
                            out += events.take(piece)
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


class OutputItems:
    """The items of a response as they grow, and the events that tell of it."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = False
        """Whether the last item goes on."""
        self._number = 0

    def event(self, kind: str, **fields: Any) -> bytes:
        """One event, with its number."""
        told = typed_event({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return told

    def take(self, piece: str | CallDelta) -> bytes:
        """Adds a piece of text or of a call."""
        if isinstance(piece, str):
            return self._said(piece)
        begun = b"" if piece.name is None else self._called(piece.name)
        self.items[-1]["arguments"] += piece.arguments
        more = self._event("response.function_call_arguments.delta", delta=piece.arguments) if piece.arguments else b""
        return begun + more

    def _said(self, text: str) -> bytes:
        out = b""
        if not self._open or self.items[-1]["type"] != "message":
            out = self.close()
            message = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant"}
            out += self._added({**message, "status": "in_progress", "content": []})
            part = _part("")
            out += self._event("response.content_part.added", content_index=0, part=part)
            self.items[-1]["content"] = [part]
        self.items[-1]["content"][0]["text"] += text
        return out + self._event("response.output_text.delta", content_index=0, delta=text, logprobs=[])

    def _called(self, name: str) -> bytes:
        ids = {"id": f"fc_{secrets.token_hex(12)}", "call_id": f"call_{secrets.token_hex(12)}"}
        call = {"type": "function_call", **ids, "name": name, "arguments": "", "status": "in_progress"}
        return self.close() + self._added(call)

    def close(self, *, cut: bool = False) -> bytes:
        """Ends the last item, where it goes on. cut: it is not whole."""
        if not self._open:
            return b""
        self._open = False
        item = self.items[-1]
        item["status"] = "incomplete" if cut else "completed"
        if item["type"] == "message":
            (part,) = item["content"]
            out = self._event("response.output_text.done", content_index=0, text=part["text"], logprobs=[])
            out += self._event("response.content_part.done", content_index=0, part=part)
        else:
            name, arguments = item["name"], item["arguments"]
            out = self._event("response.function_call_arguments.done", name=name, arguments=arguments)
        return out + self.event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _added(self, item: dict[str, Any]) -> bytes:
        self.items.append(item)
        self._open = True
        return self.event("response.output_item.added", output_index=len(self.items) - 1, item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        """One of the last item."""
        return self.event(kind, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **fields)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }
