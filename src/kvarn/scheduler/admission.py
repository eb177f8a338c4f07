"""What a request may ask for: `Limits` refuses, before anything is allocated, what could never run."""

from __future__ import annotations

from dataclasses import dataclass

from kvarn.errors import RequestError
from kvarn.request import Request


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of an engine. max_model_len: tokens of prompt and output. cache_tokens: what all blocks hold."""

    max_model_len: int
    cache_tokens: int

    @property
    def max_length(self) -> int:
        """Most tokens one sequence can have."""
        return min(self.max_model_len, self.cache_tokens)

    def check(self, request: Request) -> None:
        """Raises RequestError, naming field and numbers, for a request that does not fit even when it is alone."""
        prompt, limit = len(request.prompt_token_ids), self.max_length
        what = (
            f"the model's limit is {self.max_model_len} tokens (max_model_len)"
            if self.max_model_len <= self.cache_tokens
            else f"the KV cache holds {self.cache_tokens} tokens"
        )
        if prompt == 0:
            raise RequestError("the prompt must have at least 1 token", field="prompt")
        if prompt >= limit:
            raise RequestError(
                f"the prompt has {prompt} tokens, but {what}, of which 1 is for the output; "
                f"it may have at most {limit - 1}",
                field="prompt",
            )
        for name in ("max_tokens", "min_tokens"):
            wanted = getattr(request.sampling, name)
            if wanted is not None and prompt + wanted > limit:
                raise RequestError(
                    f"{prompt} prompt tokens and {name} {wanted} make {prompt + wanted}, but {what}; "
                    f"{name} may be at most {limit - prompt}",
                    field=name,
                )

    def max_length_of(self, request: Request) -> int:
        """Most tokens, prompt and output, that the request's sequences will have."""
        wanted = request.sampling.max_tokens
        if wanted is None:
            return self.max_length
        return min(self.max_length, len(request.prompt_token_ids) + wanted)
