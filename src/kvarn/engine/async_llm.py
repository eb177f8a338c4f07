"""`AsyncLLM`: the engine for asyncio. Requests of any number of tasks and event loops share one engine."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from types import TracebackType
from typing import Self

from kvarn.config import EngineConfig
from kvarn.engine.beam import BeamParams, BeamResult, new_search
from kvarn.engine.events import Event, RequestFailed, merge_outputs
from kvarn.engine.front import EngineFront
from kvarn.engine.load import LoadedEngine, OnPlan, load_engine
from kvarn.engine.loop import EngineLoop
from kvarn.errors import UnreadError
from kvarn.planning import Available
from kvarn.request import Request, RequestOutput
from kvarn.scheduler import Observer


class AsyncLLM(EngineFront):
    """A loaded model that answers `Request`s as streams. Close it when done."""

    def __init__(self, engine: LoadedEngine) -> None:
        """Starts the engine's thread. engine: owned from now on."""
        super().__init__(engine)
        self._mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    @classmethod
    def from_model(
        cls,
        name_or_path: str,
        config: EngineConfig | None = None,
        *,
        on_plan: OnPlan = lambda _plan: None,
        observer: Observer | None = None,
        available: Available | None = None,
    ) -> Self:
        """Loads a catalogued name, a .gguf file or a folder. Blocks for as long as loading takes; prints nothing.

        on_plan: told what the engine will take, before weights are read. observer: told of every decision and step.
        available: the memory that it may take its share of; None: what the machine has now.
        Raises ModelFileError, UnsupportedModelError, PullError, ConfigError, CapacityError.
        """
        config = config or EngineConfig()
        return cls(load_engine(name_or_path, config, on_plan=on_plan, observer=observer, available=available))

    @property
    def is_running(self) -> bool:
        """False once the engine was closed or has failed for good."""
        return self._loop.failure is None

    @property
    def is_restarting(self) -> bool:
        """Whether a step has failed and the engine is being brought back; requests wait meanwhile."""
        return self._loop.is_restarting

    @property
    def busy_seconds(self) -> float:
        """For how long the engine has been at the step that it is in; 0 while there is nothing to do. Never waits."""
        return self._loop.busy_seconds

    def check(self, request: Request) -> None:
        """Raises RequestError, naming field and limit, for a request this engine can never run."""
        self._loop.check(request)

    def check_room(self) -> None:
        """Raises QueueFullError where `generate` would for any request, so that nobody makes one ready for nothing.

        It is counted as a rejection, as that of a request is.
        """
        self._loop.check_room()

    def resolve(self, request: Request) -> Request:
        """The same with token ids in place of texts (`bad_words`), for callers to whom `generate` must return soon."""
        return self._loop.resolve(request)

    def generate(self, request: Request, *, max_unread_tokens: int | None = None) -> RequestStream:
        """Starts a request; its outputs come from the stream, in pieces as they are made.

        max_unread_tokens: beyond which it is ended, where the stream is not read. None: there is no such limit.

        The request is queued when this returns, whether or not the stream is read; it is aborted within a step when
        the stream is closed, when a task that waits on it is cancelled, or when nobody holds the stream any more.
        Must be called in a running event loop. Raises RequestError, QueueFullError, EngineError at
        once; a DeadlineError and an UnreadError come from the stream.
        """
        mailbox = self._mailbox(asyncio.get_running_loop())
        return RequestStream(self, self._loop, mailbox, request, max_unread_tokens)

    async def beam_search(self, request: Request, params: BeamParams) -> BeamResult:
        """The `request.sampling.n` best continuations, of at most `max_tokens`. No token is drawn.

        Waits for all of them; a task that is cancelled meanwhile leaves nothing running. Raises RequestError, also for
        parameters that do not go with it, QueueFullError, EngineError.
        """
        sampling = request.sampling
        self.check(request)
        search = new_search(sampling, params, len(request.prompt_token_ids), self.tokenizer.eos_token_ids)
        cached = None
        while search.open:
            prefix = f"{request.request_id}-{len(search.open[0].token_ids)}"
            extensions = [
                replace(request, request_id=f"{prefix}-{place}", sampling=params.extension,
                        prompt_token_ids=request.prompt_token_ids + beam.token_ids)
                for place, beam in enumerate(search.open)
            ]  # fmt: skip
            outputs = await self._last_outputs(extensions)
            cached = outputs[0].num_cached_tokens if cached is None else cached
            search.take([output.outputs[0].logprobs[0].top for output in outputs])
        return BeamResult(search.best(sampling.n), cached or 0)

    async def _last_outputs(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """What comes of requests of one token each, all at once."""
        async with AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(aclosing(self.generate(request))) for request in requests]
            return [merge_outputs([output async for output in stream]) for stream in streams]

    async def abort(self, request_id: str) -> None:
        """Ends a request before the next step; its stream gets a last output with FinishReason.ABORT."""
        self._loop.abort(request_id)

    async def forget_cached(self) -> int:
        """Drops the KV that is only cached, as `EngineCore.forget_cached` says. Raises EngineError."""
        return await asyncio.wrap_future(self._loop.call(lambda core: core.forget_cached()))

    async def close(self) -> None:
        """Ends the engine: requests in flight fail with EngineError, memory is released. Idempotent."""
        await asyncio.to_thread(self._closer)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _mailbox(self, loop: asyncio.AbstractEventLoop) -> _Mailbox:
        with self._lock:
            if loop not in self._mailboxes:
                self._mailboxes[loop] = _Mailbox(loop, self._loop)
            return self._mailboxes[loop]


class RequestStream:
    """The outputs of one request: an async iterator of `RequestOutput`.

    A reader that falls behind the engine gets what has gathered as one output. Ends after the output with `finished`;
    raises EngineError where the request failed. For one reader at a time.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        engine: EngineLoop,
        mailbox: _Mailbox,
        request: Request,
        max_unread_tokens: int | None = None,
    ) -> None:
        """Submits the request. Raises as `AsyncLLM.generate` says. llm: kept alive as long as the stream."""
        self._llm = llm
        self.request_id = request.request_id
        self._engine = engine
        self._ticket = weakref.ref(self)
        self._pending: list[RequestOutput] = []
        self._max_unread = max_unread_tokens
        self._num_unread = 0
        """Tokens in `_pending`."""
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._ended = True
        """There is nothing to abort: not submitted yet, or the last event has come (it may still be unread)."""
        engine.submit(request, mailbox, self._ticket)
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._pending:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._ended:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            except asyncio.CancelledError:
                self._abort()
                raise
            finally:
                self._reader = None
        pending, self._pending, self._num_unread = self._pending, [], 0
        return merge_outputs(pending)

    async def aclose(self) -> None:
        """Aborts the request if it is not finished; the stream ends. Idempotent."""
        self._abort()

    def fail(self, error: Exception) -> None:
        """Ends the request, unless it is finished: its reader gets the error. In the stream's event loop."""
        if not self._ended:
            self._abort()
            self._error = error
            self._wake_reader()

    def _abort(self) -> None:
        if not self._ended:
            self._ended = True
            self._engine.abort(self.request_id, self._ticket)
        self._pending.clear()
        self._error = None
        self._wake_reader()

    def _put(self, event: Event) -> None:
        """Called in the stream's event loop."""
        if self._ended:
            return
        if isinstance(event, RequestFailed):
            self._error, self._ended = event.error, True
        else:
            self._pending.append(event)
            self._ended = event.finished
            self._num_unread += sum(len(output.token_ids) for output in event.outputs)
            if self._max_unread is not None and self._num_unread > self._max_unread:
                most = self._max_unread
                self.fail(UnreadError(f"more than {most} tokens were left unread (max_unread_tokens)"))
        self._wake_reader()

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def __del__(self) -> None:
        self._abort()


class _Mailbox:
    """Hands events to the streams of one event loop: one wake-up of the loop for all events of a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: EngineLoop) -> None:
        # The engine holds mailboxes of requests in flight; these must not keep a loop alive that is closed.
        self._loop = weakref.ref(loop)
        self._engine = engine
        self._delivery = engine.delivery  # where several loops observe at the same moment, one value may be lost

    def receive(self, events: Sequence[tuple[object, Event]]) -> None:
        """Called in the engine's thread."""
        loop = self._loop()
        try:
            if loop is None:
                raise RuntimeError("the event loop is gone")
            loop.call_soon_threadsafe(self._deliver, events, time.perf_counter())
        except RuntimeError:
            # The loop was closed with requests in flight: nobody will read them.
            for ticket, event in events:
                self._engine.abort(event.request_id, ticket)

    def _deliver(self, events: Sequence[tuple[object, Event]], handed_over: float) -> None:
        self._delivery.observe(time.perf_counter() - handed_over)
        for ticket, event in events:
            assert isinstance(ticket, weakref.ref)
            stream = ticket()
            if stream is not None:
                stream._put(event)
