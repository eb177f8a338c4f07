"""OpenAI's request for embeddings."""

from __future__ import annotations

from typing import ClassVar

from pydantic import StrictBool, StrictInt, StrictStr

from kvarn.request import Pooling
from kvarn.server.errors import ApiError
from kvarn.server.protocol.parameters import Screening
from kvarn.server.protocol.requests import MOST_PROMPTS, ModelRequest, Prompt

MAX_INPUTS = MOST_PROMPTS
"""In one request, as OpenAI has it."""
FORMATS = ("float", "base64")


class EmbeddingRequest(ModelRequest):
    """POST /v1/embeddings."""

    screening: ClassVar[Screening] = Screening(harmless=("user",))
    input: Prompt
    encoding_format: StrictStr | None = None
    dimensions: StrictInt | None = None
    pooling: StrictStr | None = None
    """The server's own: mean or last; None: what the server was started with."""
    add_special_tokens: StrictBool | None = None
    priority: StrictInt | None = None
    cache_salt: StrictStr | None = None

    def check(self, width: int) -> None:
        """Raises ApiError naming the parameter. width: of the model's hidden states."""
        if self.encoding_format not in (None, *FORMATS):
            raise _wrong("encoding_format", f"must be {' or '.join(FORMATS)}")
        if self.dimensions is not None and not 1 <= self.dimensions <= width:
            raise _wrong("dimensions", f"must be between 1 and {width}, the model's width, not {self.dimensions}")
        if self.cache_salt == "":
            raise _wrong("cache_salt", "must not be empty; leave it out for none")

    def pooling_or(self, default: Pooling) -> Pooling:
        """The way of pooling. Raises ApiError."""
        if self.pooling is None:
            return default
        try:
            return Pooling(self.pooling)
        except ValueError:
            raise _wrong("pooling", f"must be {' or '.join(way.value for way in Pooling)}") from None


def _wrong(name: str, what: str) -> ApiError:
    return ApiError(400, f"{name} {what}", param=name, code="invalid_value")
