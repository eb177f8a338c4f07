"""`EngineLoop`: an `EngineCore` in a thread of its own. Commands go in through a queue, events come out in batches."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from kvarn.config import RESTART_DELAYS, SchedulerConfig
from kvarn.engine.core import EngineCore, new_error_id
from kvarn.engine.events import EngineStats, Event, RequestFailed, never_started
from kvarn.engine.histogram import Histogram
from kvarn.errors import EngineError, KvarnError, OverloadError, RequestError
from kvarn.grammar import CompiledGrammar
from kvarn.request import Request
from kvarn.scheduler import Backlog

if TYPE_CHECKING:
    from concurrent.futures import Future

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Receiver(Protocol):
    """Where the events of some requests go."""

    def receive(self, events: Sequence[tuple[object, Event]]) -> None:
        """Takes all events of one step at once, each with the ticket that its request was submitted with.

        Called in the engine's thread: must return soon and raise nothing.
        """
        ...


class _Address(NamedTuple):
    receiver: Receiver
    ticket: object


class EngineLoop:
    """Runs the core as long as there is work, and sleeps otherwise. All methods may be called from any thread.

    Every submitted request gets events until its last one (an output with `finished`, or a failure), also when a step
    fails or the loop is closed. When a step fails, all requests in flight fail with an error id that the log has too,
    and the core starts anew, with the weights that it has; those who ask meanwhile wait in the queue. Where it cannot,
    also after some tries, the loop refuses all requests from then on. A step that fails after each restart is no reason
    to stop: whoever can send the request that breaks it could take the model from all others.
    """

    def __init__(
        self, core: EngineCore, config: SchedulerConfig, restart_delays: Sequence[float] = RESTART_DELAYS
    ) -> None:
        """Starts the thread. core: owned from now on. config: its scheduler's; requests beyond the queue are refused.
        restart_delays: see `EngineConfig`.

        The thread is a daemon, so that a script that forgets `close` can end; but it must not be inside native code
        when the interpreter goes away, so whoever makes a loop sees to it that it is closed at exit.
        """
        self._core = core
        self._config = config
        # Reentrant: a stream's finalizer may abort at any moment, also in a thread that holds the lock.
        self._wake = threading.Condition(threading.RLock())
        self._commands: deque[Callable[[], None]] = deque()
        self._addresses: dict[str, _Address] = {}
        self._submitted: dict[str, int] = {}
        """Requests whose command to add them has not been carried out yet: prompt tokens by id."""
        self._preparing: dict[str, Request] = {}
        """Those of them that wait for their grammar."""
        self._rejections = Counter(dict.fromkeys(OverloadError.REASONS, 0))
        self._stats = core.stats()
        self._calls: set[Future[Any]] = set()
        """Of `call`, not carried out yet."""
        self._restart_delays = tuple(restart_delays)
        self._restarting = False
        self._restarts = 0
        self._has_idle_work = True
        self._busy_since: float | None = None
        """Since when it is at what it does now; None while it sleeps."""
        self._idle_failed = False
        self._end: EngineError | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvarn-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, receiver: Receiver, ticket: object = None) -> None:
        """Queues a request whose events go to `receiver`, with `ticket`: ids may be used again, tickets tell apart.

        Raises RequestError for one that can never run or whose id is in use, QueueFullError where too many wait,
        EngineError where the engine is closed or has failed.
        """
        arrived = self._core.now()
        request = self._core.resolve(request)
        self._core.check(request)
        with self._wake:
            if self._end is not None:
                raise EngineError(str(self._end))
            if request.request_id in self._addresses:
                raise RequestError(f"request_id {request.request_id!r} is in use", field="request_id")
            self._check_queue(len(request.prompt_token_ids))
            grammar = self._grammar_of(request)
            self._addresses[request.request_id] = _Address(receiver, ticket)
            self._submitted[request.request_id] = len(request.prompt_token_ids)
            if grammar is None:
                self._commands.append(lambda: self._add(request, arrived))
                self._wake.notify()
                return
            self._preparing[request.request_id] = request
        grammar.add_done_callback(lambda done: self._prepared(request, arrived, done))

    def _grammar_of(self, request: Request) -> Future[CompiledGrammar] | None:
        """The request's grammar, which may still be compiled; None where it has none. Raises OverloadError. With the
        lock held."""
        grammar = request.sampling.grammar
        try:
            return None if grammar is None else self._core.grammars.submit(grammar)
        except OverloadError as error:
            self._rejections[error.reason] += 1
            raise

    def _prepared(self, request: Request, arrived: float, done: Future[CompiledGrammar]) -> None:
        """Told, in any thread, that a request's grammar is there, or why it is not."""
        with self._wake:
            if self._preparing.get(request.request_id) is not request:
                return  # aborted meanwhile
            del self._preparing[request.request_id]
            error = done.exception()
            compiled = None if error else done.result()
            if isinstance(error, KvarnError):
                self._commands.append(lambda: self._refuse(request.request_id, error))
            else:
                self._commands.append(lambda: self._add(request, arrived, compiled))
            self._wake.notify()

    def check_room(self) -> None:
        """Raises QueueFullError where `submit` would for the shortest prompt, and counts it as a rejection as well."""
        with self._wake:
            self._check_queue(1)

    def resolve(self, request: Request) -> Request:
        """See `EngineCore.resolve`. Takes long where there are many texts; `submit` finds nothing left to do then."""
        return self._core.resolve(request)

    def check(self, request: Request) -> None:
        """Raises RequestError where `submit` would, but for an id in use."""
        self._core.check(request)

    def abort(self, request_id: str, ticket: object = None) -> None:
        """Ends a request before the next step. Its receiver gets a last output.

        Ignored where there is no such request, or where a ticket is given and the request has another.
        """
        with self._wake:
            address = self._addresses.get(request_id)
            if address is not None and ticket in (None, address.ticket):
                self._commands.append(lambda: self._abort(request_id))
                self._wake.notify()

    def call(self, work: Callable[[EngineCore], T]) -> Future[T]:
        """Has the engine's thread do something of milliseconds between two steps; the future gets what comes of it.

        Raises EngineError where the engine is closed or has failed; the future does where that happens meanwhile.
        """
        from concurrent.futures import Future

        done: Future[T] = Future()

        def run() -> None:
            self._calls.discard(done)
            try:
                done.set_result(work(self._core))
            except Exception as error:
                done.set_exception(error)
            self._publish([])

        with self._wake:
            if self._end is not None:
                raise EngineError(str(self._end))
            self._calls.add(done)
            self._commands.append(run)
            self._wake.notify()
        return done

    def stats(self) -> EngineStats:
        """A snapshot as of the last step; `queued` has the requests that came since."""
        with self._wake:
            stats, submitted, rejections = self._stats, len(self._submitted), dict(self._rejections)
            backlog = self._backlog()
        return dataclasses.replace(
            stats,
            queued=backlog.requests,
            queued_tokens=backlog.prompt_tokens,
            waiting=stats.waiting + submitted,
            rejections=rejections,
            restarts=self._restarts,
            busy_seconds=self.busy_seconds,
            ended=self._core.meter.ended,
            histograms=self._core.meter.snapshot(),
        )

    def _backlog(self) -> Backlog:
        """As of the last step, and what came since. With the lock held."""
        stats, submitted = self._stats, self._submitted
        return Backlog(stats.queued + len(submitted), stats.queued_tokens + sum(submitted.values()))

    def _check_queue(self, prompt_tokens: int) -> None:
        """Raises QueueFullError where the queue is full. With the lock held."""
        try:
            self._backlog().check(self._config, prompt_tokens)
        except OverloadError as error:
            self._rejections[error.reason] += 1
            raise

    @property
    def delivery(self) -> Histogram:
        """For receivers: seconds from `receive` to where the outputs of a step are read."""
        return self._core.meter.delivery

    @property
    def failure(self) -> EngineError | None:
        """Why the loop takes no requests; None while it does."""
        return self._end

    @property
    def busy_seconds(self) -> float:
        """For how long the thread has been at what it does now, a step mostly; 0 while it sleeps or has ended.

        Takes no lock: it is for who suspects that the thread never comes back.
        """
        since = self._busy_since
        return 0.0 if since is None or self._end is not None else time.monotonic() - since

    @property
    def is_restarting(self) -> bool:
        """Whether a step has failed and the core is not back yet: requests wait."""
        return self._restarting

    def close(self) -> None:
        """Fails what is in flight, ends the thread after the step it is in, releases the model. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        failure = EngineError("the engine was closed")
        try:
            while not self._serve():
                pass
        except _StoppedError as stopped:
            failure = EngineError(str(stopped))
        except BaseException:
            error_id = new_error_id()
            logger.exception("the engine's thread ended (error id %s)", error_id)
            failure = EngineError(f"the engine stopped (error id {error_id})")
        finally:
            with self._wake:
                self._end = failure
                self._restarting = False
                lost = self._forget_all(failure)
            self._hand_out(lost)
            self._core.close()

    def _serve(self) -> bool:
        """Takes steps until the loop is to end; False where what is around the steps failed, and the core began anew.

        Raises _StoppedError where it does not.
        """
        try:
            while self._take_commands():
                if self._core.has_work():
                    self._step()
        except _StoppedError:
            raise
        except BaseException:  # also what ends a thread: nobody else would take the commands
            error_id = new_error_id()
            logger.exception("the engine's thread failed (error id %s)", error_id)
            with self._wake:
                lost = self._forget_all(_restarted("the engine failed", error_id))
            self._restart(lost, error_id)
            return False
        return True

    def _forget_all(self, error: EngineError) -> list[Event]:
        """Drops all commands and requests; returns the failures of these. With the lock held."""
        self._commands.clear()
        self._submitted.clear()
        self._preparing.clear()
        calls, self._calls = self._calls, set()
        for call in calls:
            call.set_exception(EngineError(str(error)))
        return [RequestFailed(request_id, EngineError(str(error))) for request_id in self._addresses]

    def _take_commands(self) -> bool:
        """Waits while there is nothing to do, then applies all commands; False where the loop is to end."""
        while self._is_idle() and self._idle():
            pass  # a request waits for one piece at most
        with self._wake:
            while self._is_idle():
                self._busy_since = None
                self._wake.wait()
            self._busy_since = time.monotonic()
            if self._closing:
                return False
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        return True

    def _idle(self) -> bool:
        """Does a piece of what can be done beside requests; False where nothing is left, or where it failed."""
        if self._has_idle_work and not self._idle_failed:
            self._busy_since = time.monotonic()
            try:
                self._has_idle_work = self._core.idle()
            except Exception:
                self._idle_failed = True
                logger.exception("what the engine does while it is idle failed, and is left")
        return self._has_idle_work and not self._idle_failed

    def _is_idle(self) -> bool:
        with self._wake:
            return not (self._commands or self._closing or self._core.has_work())

    def _refuse(self, request_id: str, error: KvarnError) -> None:
        with self._wake:
            self._submitted.pop(request_id, None)
        self._publish([RequestFailed(request_id, error)])

    def _add(self, request: Request, arrived: float, _grammar: CompiledGrammar | None = None) -> None:
        """arrived: when it was submitted. _grammar: the request's, held until the core holds it."""
        request_id = request.request_id
        with self._wake:
            # One lock around both, so that the request counts as submitted or as queued at every moment.
            self._submitted.pop(request_id, None)
            try:
                self._core.add(request, arrived=arrived)
            except OverloadError as error:
                self._rejections[error.reason] += 1
                failed = RequestFailed(request_id, error)
            except KvarnError as error:
                failed = RequestFailed(request_id, error)
            except Exception:
                error_id = new_error_id()
                logger.exception("request %s could not be added (error id %s)", request_id, error_id)
                failed = RequestFailed(request_id, EngineError(f"the engine failed (error id {error_id})"))
            else:
                self._stats = self._core.stats()
                return
        self._publish([failed])

    def _abort(self, request_id: str) -> None:
        with self._wake:
            waiting = self._preparing.pop(request_id, None)
            if waiting is not None:
                del self._submitted[request_id]
        output = self._core.abort(request_id) if waiting is None else never_started(waiting)
        if output is not None:
            self._publish([output])

    def _step(self) -> None:
        self._busy_since = time.monotonic()
        self._has_idle_work = True  # there may be something new to do
        try:
            events = self._core.step()
        except BaseException:
            error_id = new_error_id()
            logger.exception("a step failed (error id %s)", error_id)
            with self._wake:
                # The core has not seen those that were only submitted: they go on.
                started = [request_id for request_id in self._addresses if request_id not in self._submitted]
            error = _restarted("a step of the engine failed", error_id)
            self._restart([RequestFailed(request_id, EngineError(str(error))) for request_id in started], error_id)
        else:
            self._publish(events)

    def _restart(self, lost: Sequence[Event], error_id: str) -> None:
        """Tells who is lost, then starts the core anew. Raises _StoppedError where no try succeeds, or on `close`."""
        self._restarting = True
        self._hand_out(lost)
        began = time.perf_counter()
        for number, delay in enumerate(self._restart_delays, 1):
            with self._wake:
                self._busy_since = None
                if self._wake.wait_for(lambda: self._closing, delay):
                    raise _StoppedError("the engine was closed")
                self._busy_since = time.monotonic()
            try:
                self._core.reset()
            except BaseException:
                tries = len(self._restart_delays)
                logger.exception("the engine cannot go on (try %d of %d, error id %s)", number, tries, error_id)
                continue
            self._restarts += 1
            self._restarting = False
            self._stats = self._core.stats()
            logger.warning("the engine goes on after %.2f s (error id %s)", time.perf_counter() - began, error_id)
            return
        raise _StoppedError(f"the engine stopped after a failed step (error id {error_id})")

    def _publish(self, events: Sequence[Event]) -> None:
        """Hands the events of a step to their receivers, each once."""
        with self._wake:
            self._stats = self._core.stats()
        self._hand_out(events)

    def _hand_out(self, events: Sequence[Event]) -> None:
        batches: dict[int, tuple[Receiver, list[tuple[object, Event]]]] = {}
        with self._wake:
            for event in events:
                last = isinstance(event, RequestFailed) or event.finished
                find = self._addresses.pop if last else self._addresses.get
                address = find(event.request_id, None)
                if address is not None:
                    batch = batches.setdefault(id(address.receiver), (address.receiver, []))[1]
                    batch.append((address.ticket, event))
        for receiver, batch in batches.values():
            receiver.receive(batch)


def _restarted(what: str, error_id: str) -> EngineError:
    return EngineError(f"{what} (error id {error_id}); the request may be sent again")


class _StoppedError(Exception):
    """The core cannot be brought back."""
