"""`Dialect`: how one client's API tells errors and ends streams. Which one it is follows from the path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from kvarn.server.events import DONE, event, typed_event

if TYPE_CHECKING:
    from kvarn.server.errors import ApiError


class Dialect(Protocol):
    """Forms of what is no answer."""

    @property
    def end(self) -> bytes:
        """The last event of a stream that is complete."""
        ...

    def body(self, error: ApiError) -> dict[str, Any]:
        """An error's JSON body."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """The last events of a stream that fails."""
        ...


OPENAI_KINDS = {429: "rate_limit_error", 503: "service_unavailable_error"}
ANTHROPIC_KINDS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip
"""Types of errors by status; the others have one for the client's fault and one for the server's."""


class OpenAIDialect:
    """{"error": {"message", "type", "param", "code"}, "request_id"}; streams end with [DONE]."""

    end = DONE

    def body(self, error: ApiError) -> dict[str, Any]:
        """See `Dialect`."""
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        kind = OPENAI_KINDS.get(error.status, kind)
        told = {"message": error.told, "type": kind, "param": error.told_param, "code": error.code}
        return {"error": told, **_identity(error)}

    def failure(self, error: ApiError) -> bytes:
        """See `Dialect`."""
        return event(self.body(error)) + DONE


class AnthropicDialect:
    """{"type": "error", "error": {"type", "message"}, "request_id"}; streams end with the answer's own last event."""

    end = b""

    def body(self, error: ApiError) -> dict[str, Any]:
        """See `Dialect`."""
        kind = ANTHROPIC_KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": error.told}, **_identity(error)}

    def failure(self, error: ApiError) -> bytes:
        """See `Dialect`."""
        return typed_event(self.body(error))


def _identity(error: ApiError) -> dict[str, str]:
    return {"request_id": error.request_id} if error.request_id else {}


class ResponsesDialect(OpenAIDialect):
    """OpenAI's errors; streams end with the answer's own last event."""

    end = b""


OPENAI, ANTHROPIC, RESPONSES = OpenAIDialect(), AnthropicDialect(), ResponsesDialect()


def dialect_of(path: str) -> Dialect:
    """The dialect of the clients that ask for a path."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return ANTHROPIC
    return RESPONSES if path == "/v1/responses" else OPENAI
