"""The output items of a response: thoughts, messages and calls as they grow, and the events that tell of it."""

from __future__ import annotations

import secrets
from typing import Any

from kvarn.server.events import typed_event
from kvarn.server.tools import CallDelta, Thought

REASONING, MESSAGE, CALL = "reasoning", "message", "function_call"


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

    def take(self, piece: str | CallDelta | Thought, logprobs: list[dict[str, Any]]) -> bytes:
        """Adds a piece of thoughts, of text or of a call. logprobs: of the text's tokens, in the API's shape."""
        if isinstance(piece, Thought):
            return self._thought(piece.text)
        if isinstance(piece, str):
            return self._said(piece, logprobs)
        begun = b"" if piece.name is None else self._called(piece.name)
        self.items[-1]["arguments"] += piece.arguments
        more = self._event("response.function_call_arguments.delta", delta=piece.arguments) if piece.arguments else b""
        return begun + more

    def late(self, logprobs: list[dict[str, Any]]) -> None:
        """Adds logprobs of tokens after which no more text came."""
        if self._open and self.items[-1]["type"] == MESSAGE:
            self.items[-1]["content"][0]["logprobs"] += logprobs

    def _thought(self, text: str) -> bytes:
        item = {"id": f"rs_{secrets.token_hex(12)}", "type": REASONING, "summary": []}
        begun = b"" if self._goes_on(REASONING) else self._begun(item, {"type": "reasoning_text", "text": ""})
        self.items[-1]["content"][0]["text"] += text
        return begun + self._event("response.reasoning_text.delta", content_index=0, delta=text)

    def _said(self, text: str, logprobs: list[dict[str, Any]]) -> bytes:
        item = {"id": f"msg_{secrets.token_hex(12)}", "type": MESSAGE, "role": "assistant"}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        begun = b"" if self._goes_on(MESSAGE) else self._begun(item, part)
        (part,) = self.items[-1]["content"]
        part["text"] += text
        part["logprobs"] += logprobs
        return begun + self._event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _goes_on(self, kind: str) -> bool:
        return self._open and self.items[-1]["type"] == kind

    def _begun(self, item: dict[str, Any], part: dict[str, Any]) -> bytes:
        """An item of one part, which is empty."""
        out = self.close() + self._added({**item, "status": "in_progress", "content": []})
        out += self._event("response.content_part.added", content_index=0, part=part)
        self.items[-1]["content"] = [part]
        return out

    def _called(self, name: str) -> bytes:
        ids = {"id": f"fc_{secrets.token_hex(12)}", "call_id": f"call_{secrets.token_hex(12)}"}
        call = {"type": CALL, **ids, "name": name, "arguments": "", "status": "in_progress"}
        return self.close() + self._added(call)

    def close(self, *, cut: bool = False) -> bytes:
        """Ends the last item, where it goes on. cut: it is not whole."""
        if not self._open:
            return b""
        self._open = False
        item = self.items[-1]
        item["status"] = "incomplete" if cut else "completed"
        if item["type"] == CALL:
            name, arguments = item["name"], item["arguments"]
            out = self._event("response.function_call_arguments.done", name=name, arguments=arguments)
        else:
            out = self._part_done(item)
        return out + self.event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _part_done(self, item: dict[str, Any]) -> bytes:
        (part,) = item["content"]
        if item["type"] == REASONING:
            out = self._event("response.reasoning_text.done", content_index=0, text=part["text"])
        else:
            told = {"text": part["text"], "logprobs": part["logprobs"]}
            out = self._event("response.output_text.done", content_index=0, **told)
        return out + self._event("response.content_part.done", content_index=0, part=part)

    def _added(self, item: dict[str, Any]) -> bytes:
        self.items.append(item)
        self._open = True
        return self.event("response.output_item.added", output_index=len(self.items) - 1, item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        """One of the last item."""
        return self.event(kind, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **fields)
