"""Who gets in: `Limits` refuses what could never run, `Backlog` what is too much at the moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from kvarn.cache import BlockPool
from kvarn.config import SchedulerConfig
from kvarn.errors import DeadlineError, QueueFullError, RequestError
from kvarn.request import Request


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of an engine. max_model_len: tokens of prompt and output. cache_tokens: of the longest sequence for
    which all blocks are enough."""

    max_model_len: int
    cache_tokens: int

    @classmethod
    def of(cls, pool: BlockPool, num_reserved: int, chunk: int, max_model_len: int) -> Self:
        """Those of a pool, of which no sequence can count on `num_reserved` blocks. chunk: most tokens of a step."""
        return cls(max_model_len, pool.windows.longest(pool.num_blocks - num_reserved, chunk, max_model_len))

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


@dataclass(slots=True)
class Backlog:
    """The requests of which nothing has been computed yet. Mutable."""

    requests: int = 0
    prompt_tokens: int = 0

    def check(self, config: SchedulerConfig, prompt_tokens: int) -> None:
        """Raises QueueFullError, naming the limit, where there is no room for one more of that many prompt tokens.

        Where nothing waits there is room for any prompt, or one longer than the limit could never run.
        """
        limit = config.max_num_queued_requests
        if self.requests >= limit:
            raise QueueFullError(
                f"{self.requests} requests are waiting, the limit is {limit} (max_num_queued_requests); "
                "try again later",
                reason="queued_requests",
            )
        tokens = config.max_num_queued_tokens
        if tokens is not None and self.requests and self.prompt_tokens + prompt_tokens > tokens:
            raise QueueFullError(
                f"{self.prompt_tokens} prompt tokens are waiting, and {prompt_tokens} more would exceed the limit of "
                f"{tokens} (max_num_queued_tokens); try again later",
                reason="queued_tokens",
            )

    def add(self, prompt_tokens: int) -> None:
        """One more."""
        self.requests += 1
        self.prompt_tokens += prompt_tokens

    def remove(self, prompt_tokens: int) -> None:
        """One of them has been admitted, or has ended."""
        self.requests -= 1
        self.prompt_tokens -= prompt_tokens


def check_deadline(asked: float, expected: float) -> None:
    """Raises DeadlineError for a first token that is asked for in milliseconds `asked`, and `expected` in seconds."""
    if expected * 1000 > asked:
        raise DeadlineError(
            f"the first token is to be expected in {expected * 1000:.0f} ms, later than the {asked:g} ms of its "
            "deadline (ttft_slo_ms); try again later",
            reason="ttft_slo",
            retry_after=expected - asked / 1000,
        )
