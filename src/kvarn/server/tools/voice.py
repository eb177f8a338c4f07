"""`Voice`: text and calls of one answer of a chat, as they come, and in OpenAI's shapes."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Protocol

from kvarn.request import FinishReason
from kvarn.server.tools.calls import CallDelta
from kvarn.server.tools.use import ToolUse


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of what the model thinks before it answers."""

    text: str


class Splitter(Protocol):
    """Tells a model's thoughts from its answer."""

    def take(self, text: str, *, ended: bool) -> tuple[str, str]:
        """(thoughts, answer) that a piece of text adds. ended: it is the last one."""
        ...


class Voice:
    """Turns the text of one answer into content and tool calls, either `whole` or by `deltas`."""

    def __init__(self, tools: ToolUse | None, thoughts: Splitter | None = None) -> None:
        """tools: that may be called; None: all is content. thoughts: tells them from that; None: there are none."""
        self._reader = None if tools is None else tools.reader()
        self._thoughts = thoughts

    def whole(self, text: str) -> dict[str, Any]:
        """`content`, and `tool_calls` where there are any, of a message."""
        content, thoughts, calls = "", "", list[dict[str, Any]]()
        for delta in self.deltas(text, ended=True):
            content += delta.get("content", "")
            thoughts += delta.get("reasoning", "")
            for piece in delta.get("tool_calls", ()):
                if "id" in piece:
                    calls.append({key: piece[key] for key in ("id", "type", "function")})
                else:
                    calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
        told = {} if self._thoughts is None else _reasoning(thoughts or None)
        return {"content": content or None, **told, "tool_calls": calls} if calls else {"content": content, **told}

    def deltas(self, text: str, *, ended: bool) -> list[dict[str, Any]]:
        """What a piece of text adds to a message. ended: it is the last one."""
        return [_delta(piece) for piece in self.pieces(text, ended=ended)]

    def pieces(self, text: str, *, ended: bool) -> list[str | CallDelta | Thought]:
        """The same in nobody's shape."""
        said = list[str | CallDelta | Thought]()
        if self._thoughts is not None:
            thought, text = self._thoughts.take(text, ended=ended)
            said += [Thought(thought)] if thought else []
        if self._reader is None:
            return [*said, text] if text else said
        said += self._reader.take(text)
        said += self._reader.finish() if ended else []
        return said

    @property
    def num_calls(self) -> int:
        """Calls that have begun so far."""
        return 0 if self._reader is None else self._reader.num_calls

    def finish_reason(self, reason: FinishReason | None) -> str | None:
        """As OpenAI spells it."""
        if reason is FinishReason.STOP and self.num_calls:
            return "tool_calls"
        return None if reason is None else reason.value


def _reasoning(text: str | None) -> dict[str, Any]:
    """Under the two names that clients look for: DeepSeek's, and vLLM's of today."""
    return {"reasoning_content": text, "reasoning": text}


def _delta(piece: str | CallDelta | Thought) -> dict[str, Any]:
    if isinstance(piece, Thought):
        return _reasoning(piece.text)
    return {"content": piece} if isinstance(piece, str) else {"tool_calls": [_piece(piece)]}


def _piece(delta: CallDelta) -> dict[str, Any]:
    if delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
