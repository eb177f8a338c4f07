"""`Voice`: text and calls of one answer of a chat, as they come, and in OpenAI's shapes."""

from __future__ import annotations

import secrets
from typing import Any

from kvarn.request import FinishReason
from kvarn.server.tools.calls import CallDelta
from kvarn.server.tools.use import ToolUse


class Voice:
    """Turns the text of one answer into content and tool calls, either `whole` or by `deltas`."""

    def __init__(self, tools: ToolUse | None) -> None:
        """tools: that may be called; None: all is content."""
        self._reader = None if tools is None else tools.reader()

    def whole(self, text: str) -> dict[str, Any]:
        """`content`, and `tool_calls` where there are any, of a message."""
        content, calls = "", list[dict[str, Any]]()
        for delta in self.deltas(text, ended=True):
            content += delta.get("content", "")
            for piece in delta.get("tool_calls", ()):
                if "id" in piece:
                    calls.append({key: piece[key] for key in ("id", "type", "function")})
                else:
                    calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
        return {"content": content or None, "tool_calls": calls} if calls else {"content": content}

    def deltas(self, text: str, *, ended: bool) -> list[dict[str, Any]]:
        """What a piece of text adds to a message. ended: it is the last one."""
        said = self.pieces(text, ended=ended)
        return [{"content": part} if isinstance(part, str) else {"tool_calls": [_piece(part)]} for part in said]

    def pieces(self, text: str, *, ended: bool) -> list[str | CallDelta]:
        """The same, in nobody's shape."""
        if self._reader is None:
            return [text] if text else []
        said = self._reader.take(text)
        return said + self._reader.finish() if ended else said

    @property
    def num_calls(self) -> int:
        """Calls that have begun so far."""
        return 0 if self._reader is None else self._reader.num_calls

    def finish_reason(self, reason: FinishReason | None) -> str | None:
        """As OpenAI spells it."""
        if reason is FinishReason.STOP and self.num_calls:
            return "tool_calls"
        return None if reason is None else reason.value


def _piece(delta: CallDelta) -> dict[str, Any]:
    if delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
