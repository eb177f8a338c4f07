"""Running the engine requests behind one HTTP request: several prompts, each with n answers, as one stream."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace

from kvarn.engine import AsyncLLM, RequestStream
from kvarn.errors import OverloadError, RequestError
from kvarn.request import FinishReason, Request, RequestOutput, SamplingParams, SequenceOutput, TokenLogprob
from kvarn.server.caller import Caller
from kvarn.server.errors import ApiError
from kvarn.server.limits import ServerLimits
from kvarn.server.load import RequestLoad
from kvarn.server.record import RequestRecord

GUESSED_TOKENS = 256
"""Of an answer without max_tokens, as long as it is not known; a key's rate makes up for more afterwards."""
_LONGEST_TIMER = 86_400.0
"""Seconds; loops take no endless ones."""


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


def _within(sampling: SamplingParams, limits: ServerLimits) -> SamplingParams:
    """The same, of at most as many tokens as are allowed. Raises RequestError for more that were asked for."""
    most = limits.max_output_tokens
    if most is None:
        return sampling
    if sampling.max_tokens is not None and sampling.max_tokens > most:
        message = f"max_tokens must be at most {most}, not {sampling.max_tokens} (max_output_tokens)"
        raise RequestError(message, field="max_tokens")
    return sampling if sampling.max_tokens is not None else replace(sampling, max_tokens=most)


def check_prompt(request: Request, limits: ServerLimits) -> None:
    """Raises RequestError for a prompt of more tokens than are allowed."""
    count, most = len(request.prompt_token_ids), limits.max_prompt_tokens
    if most is not None and count > most:
        message = f"the prompt has {count} tokens, at most {most} are allowed (max_prompt_tokens)"
        raise RequestError(message, field="prompt")


def seconds_left(record: RequestRecord) -> float:
    """Until a request's deadline, or as long as a timer can be."""
    return min(record.deadline - time.monotonic(), _LONGEST_TIMER)


def too_late(limits: ServerLimits) -> ApiError:
    """What a request is told whose answer was not there in time."""
    message = f"the answer took longer than {limits.request_timeout:g} s (--request-timeout)"
    return ApiError(504, message, code="request_timeout")


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
        priority: int | None = None,
        cache_salt: str = "",
        refusal: Callable[[RequestError], Exception] = lambda error: error,
    ) -> None:
        """Checks each prompt as it comes, and all before any is queued. Any thread may call.

        Raises RequestError. The caller's record is told of what comes out.

        priority, cache_salt: None and "": those of the caller's key. refusal: what to raise where it turns out later
        that a request is wrong.
        """
        self._llm = llm
        self._record, self._limits = caller.record, caller.limits
        sampling = _within(sampling, caller.limits)
        self._refusal = refusal
        self._trace = caller.trace
        self._caller = caller
        self.n = sampling.n
        self.answer_id = answer_id
        self.requests: list[Request] = []
        account = caller.visit.account
        # Clients may choose ids of answers, and others the same.
        unique = secrets.token_hex(4)
        for index, ids in enumerate(prompts):
            request = Request(
                f"{answer_id}-{unique}-{index}",
                tuple(ids),
                sampling,
                priority=account.priority(priority),
                tenant=caller.tenant,
                cache_salt=cache_salt or account.key.cache_salt,
                ttft_slo_ms=caller.ttft_slo_ms,
            )
            check_prompt(request, caller.limits)
            request = llm.resolve(request)
            llm.check(request)
            self.requests.append(request)
        self.prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = {}
        """By prompt, of its tokens from the second on, where they were asked for: as soon as any delta has come."""
        self.usage = Usage(prompt=sum(len(request.prompt_token_ids) for request in self.requests))
        if sampling.max_tokens is None:
            caller.visit.reserve(self.usage.prompt, guessed=self.num_choices * GUESSED_TOKENS)
        else:
            caller.visit.reserve(self.usage.prompt + self.num_choices * sampling.max_tokens)
        caller.record.answer_id, caller.record.usage = answer_id, self.usage

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
        return self._caller.loads.request(self._caller.visit.account.name or self._caller.tenant, self.usage.prompt)

    async def _outputs(self) -> AsyncGenerator[list[tuple[int, SequenceOutput]], None]:
        async with AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(aclosing(self._begin(r))) for r in self.requests]
            stack.callback(self._end_in_time(streams).cancel)
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

    def _begin(self, request: Request) -> RequestStream:
        return self._llm.generate(request, max_unread_tokens=self._limits.max_unread_tokens)

    def _end_in_time(self, streams: Sequence[RequestStream]) -> asyncio.TimerHandle:
        """Ends what still runs at the request's deadline, whether or not somebody reads it."""

        def expire() -> None:
            for stream in streams:
                stream.fail(too_late(self._limits))

        return asyncio.get_running_loop().call_later(seconds_left(self._record), expire)

    def _deltas(self, prompt: int, output: RequestOutput) -> list[tuple[int, SequenceOutput]]:
        record = self._record
        if record.first_token is None:
            record.first_token = time.monotonic()
        for delta in output.outputs:
            if delta.finish_reason is not None:
                record.finish_reasons[prompt * self.n + delta.index] = delta.finish_reason.value
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
