"""`RequestRecord`: what comes to be known of one HTTP request, for its log line and its key's account."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvarn.server.generation import Usage

REQUEST_ID = "x-request-id"
_SANE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def request_id_of(offered: str | None) -> str:
    """The id that a client or proxy gave the request, where it is 1 to 128 plain characters; else a fresh one."""
    if offered is not None and _SANE.fullmatch(offered):
        return offered
    return f"req_{secrets.token_hex(12)}"


@dataclass(slots=True)
class RequestRecord:
    """Mutable; made when the headers are there, told of the rest by those who learn it. Nothing of what was said."""

    request_id: str
    method: str = ""
    path: str = ""
    deadline: float = float("inf")
    """When the answer must have ended, in seconds of `time.monotonic`."""
    began: float = field(default_factory=time.monotonic)
    key: str = ""
    """Name of the API key; empty where there are no keys."""
    model: str = ""
    answer_id: str = ""
    usage: Usage | None = None
    """Counted on while the answer goes on; None where nothing was generated."""
    first_token: float | None = None
    """When the first output came."""
    finish_reasons: dict[int, str] = field(default_factory=dict)
    """By choice."""
    status: int = 0
    """0 where no answer has begun: the client left."""
    error: str = ""
    """The code of the error, also of one in the middle of a stream."""
    message: str = ""
    """Its message, which names the limit where it is about one. Not for logs: it may repeat what was sent."""

    more_headers: Callable[[], Iterable[tuple[bytes, bytes]]] = tuple
    """What the answer's headers tell of the key's limits."""

    @property
    def tokens(self) -> int:
        """Those that the request is charged for: none where it was refused before anything came of it."""
        if self.usage is None or (self.first_token is None and self.status >= 400):
            return 0
        return self.usage.prompt + self.usage.completion

    def fields(self, now: float) -> dict[str, str | int | float]:
        """What a log says of it, in order. Times in milliseconds; what is not known is left out."""
        found: dict[str, str | int | float | None] = {
            "request_id": self.request_id,
            "key": self.key or None,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "model": self.model or None,
            "answer_id": self.answer_id or None,
        }
        usage = self.usage
        if usage is not None:
            found |= {
                "prompt_tokens": usage.prompt,
                "cached_tokens": usage.cached,
                "completion_tokens": usage.completion,
            }
        if self.first_token is not None:
            found["ttft_ms"] = round((self.first_token - self.began) * 1000, 1)
        found["e2e_ms"] = round((now - self.began) * 1000, 1)
        found["finish"] = ",".join(dict.fromkeys(self.finish_reasons.values())) or None
        found["error"] = self.error or None
        return {name: value for name, value in found.items() if value is not None}
