"""Running the engine requests behind one HTTP request: several prompts, each with n answers, as one stream."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass, field

from kvarn.engine import AsyncLLM
from kvarn.errors import OverloadError, RequestError
from kvarn.request import FinishReason, Request, RequestOutput, SamplingParams, SequenceOutput, TokenLogprob
from kvarn.server.caller import Caller
from kvarn.server.load import RequestLoad


def new_id(prefix: str) -> str:
    """A fresh id as those of the clients' APIs look. prefix: with what stands between it and the random characters."""
    return f"{prefix}{secrets.token_hex(12)}"


@dataclass(slots=True)
class Usage:
    """Token counts of one HTTP request."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    drafted: int = 0
    accepted: int = 0

    def body(self) -> dict[str, object]:
        """As OpenAI has it."""
        guessed = {
            "accepted_prediction_tokens": self.accepted,
            "rejected_prediction_tokens": self.drafted - self.accepted,
        }
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            **({"completion_tokens_details": guessed} if self.drafted else {}),
        }


@dataclass(slots=True)
class Answer:
    """One whole answer, gathered from deltas."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def take(self, delta: SequenceOutput) -> None:
        """Adds a delta."""
        self.stop_reason = delta.stop_reason
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason


class Generation:
    """The engine requests of one HTTP request. Choice index = prompt index * n + sequence index."""

    def __init__(
        self,
        llm: AsyncLLM,
        prompts: Iterable[Sequence[int]],
        sampling: SamplingParams,
        answer_id: str,
        caller: Caller,
        *,
        priority: int = 0,
        cache_salt: str = "",
        refusal: Callable[[RequestError], Exception] = lambda error: error,
    ) -> None:
        """Checks each prompt as it comes, and all before any is queued. Any thread may call. Raises RequestError.

        refusal: what to raise where it turns out later that a request is wrong.
        """
        self._llm = llm
        self._refusal = refusal
        self._trace = caller.trace
        self._caller = caller
        self.n = sampling.n
        self.answer_id = answer_id
        self.requests: list[Request] = []
        # Clients may choose ids of answers, and others the same.
        unique = secrets.token_hex(4)
        for index, ids in enumerate(prompts):
            request = Request(
                f"{answer_id}-{unique}-{index}",
                tuple(ids),
                sampling,
                priority=priority,
                tenant=caller.tenant,
                cache_salt=cache_salt,
                ttft_slo_ms=caller.ttft_slo_ms,
            )
            request = llm.resolve(request)
            llm.check(request)
            self.requests.append(request)
        self.prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = {}
        """By prompt, of its tokens from the second on, where they were asked for: as soon as any delta has come."""
        self.usage = Usage(prompt=sum(len(request.prompt_token_ids) for request in self.requests))

    @property
    def num_choices(self) -> int:
        """Number of answers."""
        return len(self.requests) * self.n

    async def stream(self) -> AsyncGenerator[list[tuple[int, SequenceOutput]], None]:
        """(choice index, delta) pairs as they come. Closing it aborts what still runs."""
        async with aclosing(self._outputs()) as outputs:
            try:
                with self._in_flight() as load:
                    async for deltas in outputs:
                        load.gained(sum(len(delta.token_ids) for _, delta in deltas))
                        yield deltas
            except RequestError as error:
                raise error if isinstance(error, OverloadError) else self._refusal(error) from None

    def _in_flight(self) -> AbstractContextManager[RequestLoad]:
        """Counts as its tenant's load for as long as the context lasts."""
        return self._caller.loads.request(self._caller.tenant, self.usage.prompt)

    async def _outputs(self) -> AsyncGenerator[list[tuple[int, SequenceOutput]], None]:
        async with AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(aclosing(self._llm.generate(r))) for r in self.requests]
            if len(streams) == 1:
                async for output in streams[0]:
                    yield self._deltas(0, output)
                return
            queue: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue(maxsize=len(streams))

            async def feed(index: int) -> None:
                try:
                    async for output in streams[index]:
                        await queue.put((index, output))
                    await queue.put((index, None))
                except Exception as error:  # handed to the reader, who raises it
                    await queue.put((index, error))

            feeders = [asyncio.create_task(feed(index)) for index in range(len(streams))]
            try:
                left = len(streams)
                while left:
                    index, item = await queue.get()
                    if isinstance(item, Exception):
                        raise item
                    if item is None:
                        left -= 1
                    else:
                        yield self._deltas(index, item)
            finally:
                for feeder in feeders:
                    feeder.cancel()
                await asyncio.gather(*feeders, return_exceptions=True)

    def _deltas(self, prompt: int, output: RequestOutput) -> list[tuple[int, SequenceOutput]]:
        if output.prompt_logprobs:
            self.prompt_logprobs[prompt] = output.prompt_logprobs
        self._trace.output(self._llm.model_name, self.requests[prompt], output)
        self.usage.completion += sum(len(delta.token_ids) for delta in output.outputs)
        if output.finished:
            self.usage.cached += output.num_cached_tokens
            self.usage.drafted += output.num_draft_tokens
            self.usage.accepted += output.num_accepted_tokens
        return [(prompt * self.n + delta.index, delta) for delta in output.outputs]

    async def whole(self) -> list[Answer]:
        """All answers, complete."""
        answers = [Answer() for _ in range(self.num_choices)]
        async with aclosing(self.stream()) as stream:
            async for deltas in stream:
                for index, delta in deltas:
                    answers[index].take(delta)
        return answers
