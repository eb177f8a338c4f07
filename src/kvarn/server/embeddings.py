"""POST /v1/embeddings: what it asks of the engine, and the body of its answer."""

from __future__ import annotations

import asyncio
import base64
import math
import sys
from array import array
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from typing import Any

from kvarn.engine import AsyncLLM
from kvarn.errors import EngineError, RequestError
from kvarn.request import Pooling, Request, SamplingParams
from kvarn.server.caller import Caller
from kvarn.server.errors import ApiError
from kvarn.server.generation import Usage, check_prompt, new_id, seconds_left, too_late
from kvarn.server.protocol import EmbeddingRequest
from kvarn.server.state import Served

IN_FLIGHT = 32
"""Inputs of one request that the engine has at the same time."""


def asked_embeddings(body: EmbeddingRequest, served: Served, caller: Caller, default: Pooling) -> EmbeddingAnswer:
    """The answer that the body asks for. default: the way of pooling where it does not say. Raises ApiError."""
    llm, answer_id, account = served.llm, new_id("embd-"), caller.visit.account
    body.check(llm.model_config.hidden_size)
    pooling = body.pooling_or(default)
    requests = []
    try:
        for place, ids in enumerate(served.prompts.inputs(body)):
            request = Request(
                f"{answer_id}-{place}", tuple(ids), SamplingParams(max_tokens=1),
                priority=account.priority(body.priority), tenant=caller.tenant,
                cache_salt=body.cache_salt or account.key.cache_salt, ttft_slo_ms=caller.ttft_slo_ms, pooling=pooling,
            )  # fmt: skip
            check_prompt(request, caller.limits)
            llm.check(request)
            requests.append(request)
    except RequestError as error:
        name = "input" if error.field == "prompt" else error.field
        raise ApiError(400, str(error), param=name, code="invalid_value") from None
    usage = Usage(prompt=sum(len(request.prompt_token_ids) for request in requests))
    caller.visit.reserve(usage.prompt)
    caller.record.answer_id, caller.record.usage = answer_id, usage
    as_base64 = body.encoding_format == "base64"
    return EmbeddingAnswer(
        llm, requests, served.name, caller, dimensions=body.dimensions, as_base64=as_base64
    )  # fmt: skip


class EmbeddingAnswer:
    """The vectors of some inputs, each of length 1. They go through the engine's steps as all requests do."""

    def __init__(
        self,
        llm: AsyncLLM,
        requests: Sequence[Request],
        model: str,
        caller: Caller,
        *,
        dimensions: int | None,
        as_base64: bool,
    ) -> None:
        """requests: checked. dimensions: leading ones of each vector that are kept; None: all."""
        self._llm = llm
        self._requests = requests
        self._model = model
        self._dimensions = dimensions
        self._as_base64 = as_base64
        self._caller = caller
        self._vectors: list[Any] = [None] * len(requests)

    async def whole(self) -> dict[str, Any]:
        """The response body. Where one input fails, all do. Raises ApiError 504 at the request's deadline."""
        places = iter(range(len(self._requests)))
        workers = [asyncio.create_task(self._embed(places)) for _ in range(min(IN_FLIGHT, len(self._requests)))]
        try:
            async with asyncio.timeout(seconds_left(self._caller.record)):
                await asyncio.gather(*workers)
        except TimeoutError:
            raise too_late(self._caller.limits) from None
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        tokens = sum(len(request.prompt_token_ids) for request in self._requests)
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": n, "embedding": v} for n, v in enumerate(self._vectors)],
            "model": self._model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    async def _embed(self, places: Iterable[int]) -> None:
        """Embeds one after the other of the inputs that are left."""
        for place in places:
            async with aclosing(self._llm.generate(self._requests[place])) as stream:
                async for output in stream:
                    self._caller.trace.output(self._llm.model_name, self._requests[place], output)
                    if output.embedding is None:
                        raise EngineError("the request was aborted")
                    self._vectors[place] = self._told(output.embedding)

    def _told(self, vector: Sequence[float]) -> Any:
        values = unit(vector[: self._dimensions])
        if not self._as_base64:
            return values.tolist()
        if sys.byteorder == "big":
            values.byteswap()
        return base64.b64encode(values.tobytes()).decode()


def unit(vector: Sequence[float]) -> array[float]:
    """The vector with length 1, as float32; zeros stay zeros."""
    length = math.sqrt(math.fsum(value * value for value in vector))
    return array("f", (value / length for value in vector) if length > 0 else vector)
