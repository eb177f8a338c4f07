"""What clients may send: the request models, and the tables that say what becomes of every other parameter."""

from kvarn.server.protocol.parameters import HARMLESS, MOST_ENTRIES, NEUTRAL, RENAMED, screen
from kvarn.server.protocol.requests import (
    MAX_PROMPTS,
    ChatCompletionRequest,
    CompletionRequest,
    ModelRequest,
    SamplingRequest,
)  # fmt: skip

__all__ = [
    "HARMLESS", "MAX_PROMPTS", "MOST_ENTRIES", "NEUTRAL", "RENAMED", "ChatCompletionRequest", "CompletionRequest",
    "ModelRequest", "SamplingRequest", "screen",
]  # fmt: skip
