"""POST /v1/messages: the bodies of its answers, in Anthropic's form."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from kvarn.request import FinishReason
from kvarn.server.asking import Chat
from kvarn.server.events import typed_event
from kvarn.server.generation import Usage
from kvarn.server.tools import CallDelta, Thought


class MessageAnswer:
    """Builds the bodies of one message, whole or as a stream; once."""

    def __init__(self, chat: Chat) -> None:
        self._generation = chat.generation
        (self._voice,) = chat.voices()
        self._model = chat.model
        self._blocks = 0
        """Content blocks that have begun."""
        self._open: str | None = None
        """Type of the last of them while it goes on."""

    async def whole(self) -> dict[str, Any]:
        """The response body."""
        (answer,) = await self._generation.whole()
        content = _blocks(self._voice.pieces(answer.text, ended=True))
        ended = self._ended(answer.finish_reason, answer.stop_reason)
        return {**self._message(content), **ended, "usage": _usage(self._generation.usage)}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._generation.answer_id, "type": "message", "role": "assistant", "model": self._model,
            "content": content,
        }  # fmt: skip

    def _ended(self, reason: FinishReason | None, stop: str | int | None) -> dict[str, Any]:
        """`stop_reason` and `stop_sequence`."""
        if reason is FinishReason.LENGTH:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if isinstance(stop, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        return {"stop_reason": "tool_use" if self._voice.num_calls else "end_turn", "stop_sequence": None}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The response as events: the message, its content blocks with their deltas, why it ended."""
        started = {**self._message([]), "stop_reason": None, "stop_sequence": None}
        usage = {"input_tokens": self._generation.usage.prompt, "output_tokens": 0}
        out = typed_event({"type": "message_start", "message": {**started, "usage": usage}})
        reason: FinishReason | None = None
        stop: str | int | None = None
        async with aclosing(self._generation.stream()) as stream:
            async for deltas in stream:
                for _, part in deltas:
                    reason, stop = part.finish_reason, part.stop_reason
                    for piece in self._voice.pieces(part.text, ended=reason is not None):
                        out += self._delta(piece)
                if out:
                    yield out
                out = b""
        delta, usage = self._ended(reason, stop), _usage(self._generation.usage)
        last = typed_event({"type": "message_delta", "delta": delta, "usage": usage})
        yield self._closed() + last + typed_event({"type": "message_stop"})

    def _delta(self, piece: str | CallDelta | Thought) -> bytes:
        """The events of a piece of thoughts, of text or of a call: its block begins where it must."""
        if isinstance(piece, Thought):
            begun = b"" if self._open == "thinking" else self._begun(_thinking(""))
            return begun + self._gained({"type": "thinking_delta", "thinking": piece.text})
        if isinstance(piece, str):
            begun = b"" if self._open == "text" else self._begun({"type": "text", "text": ""})
            return begun + self._gained({"type": "text_delta", "text": piece})
        begun = b"" if piece.name is None else self._begun(_tool_use(piece.name))
        more = piece.arguments
        return begun + (self._gained({"type": "input_json_delta", "partial_json": more}) if more else b"")

    def _begun(self, block: dict[str, Any]) -> bytes:
        closed, self._open = self._closed(), block["type"]
        self._blocks += 1
        event = {"type": "content_block_start", "index": self._blocks - 1, "content_block": block}
        return closed + typed_event(event)

    def _gained(self, delta: dict[str, Any]) -> bytes:
        return typed_event({"type": "content_block_delta", "index": self._blocks - 1, "delta": delta})

    def _closed(self) -> bytes:
        if self._open is None:
            return b""
        signed = self._gained({"type": "signature_delta", "signature": ""}) if self._open == "thinking" else b""
        self._open = None
        return signed + typed_event({"type": "content_block_stop", "index": self._blocks - 1})


def _blocks(pieces: list[str | CallDelta | Thought]) -> list[dict[str, Any]]:
    """The content of a whole answer. A call that was cut short is none."""
    blocks, arguments = list[dict[str, Any]](), dict[int, str]()
    for piece in pieces:
        if isinstance(piece, CallDelta):
            if piece.name is not None:
                blocks.append(_tool_use(piece.name))
            arguments[len(blocks) - 1] = arguments.get(len(blocks) - 1, "") + piece.arguments
        elif isinstance(piece, Thought):  # all of it comes first, in one piece
            blocks.append(_thinking(piece.text))
        elif blocks and blocks[-1]["type"] == "text":
            blocks[-1]["text"] += piece
        else:
            blocks.append({"type": "text", "text": piece})
    for place, text in arguments.items():
        try:
            blocks[place]["input"] = json.loads(text)
        except ValueError:
            del blocks[place]  # the last one
    return blocks


def _thinking(text: str) -> dict[str, Any]:
    """signature: Anthropic's proves that a thought is the model's own; here nobody asks."""
    return {"type": "thinking", "thinking": text, "signature": ""}


def _tool_use(name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": name, "input": {}}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion,
    }
