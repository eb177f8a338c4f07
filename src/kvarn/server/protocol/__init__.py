"""What clients may send: the request models, and the tables that say what becomes of every other parameter."""

from kvarn.server.protocol.embeddings import MAX_INPUTS, EmbeddingRequest
from kvarn.server.protocol.parameters import HARMLESS, LIMIT_NAMES, MOST_ENTRIES, NEUTRAL, RENAMED, screen
from kvarn.server.protocol.requests import (
    MAX_PROMPTS,
    MAX_REQUEST_ID_CHARS,
    AnswerRequest,
    ChatCompletionRequest,
    CompletionRequest,
    ModelRequest,
    SamplingRequest,
)  # fmt: skip
from kvarn.server.protocol.tokens import DetokenizeRequest, TokenizeRequest

__all__ = [
    "HARMLESS", "LIMIT_NAMES", "MAX_INPUTS", "MAX_PROMPTS", "MAX_REQUEST_ID_CHARS", "MOST_ENTRIES", "NEUTRAL",
    "RENAMED", "AnswerRequest", "ChatCompletionRequest", "CompletionRequest", "DetokenizeRequest",
    "EmbeddingRequest", "ModelRequest", "SamplingRequest", "TokenizeRequest", "screen",
]  # fmt: skip
