"""`GrammarCompiler`: grammars to matchers, beside everything else, within bounds, and each once."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from queue import SimpleQueue
from typing import TYPE_CHECKING
from weakref import WeakSet, WeakValueDictionary

from kvarn.config import GrammarConfig
from kvarn.errors import EngineError, KvarnError, QueueFullError, RequestError
from kvarn.grammar.source import check_grammar, to_llguidance
from kvarn.grammar.trial import STACK_BYTES, TrialProcess
from kvarn.grammar.vocabulary import GrammarVocabulary, cause, new_matcher
from kvarn.request import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class CompiledGrammar:
    """A grammar for one vocabulary. Immutable: sequences take matchers of their own from it."""

    def __init__(self, grammar: Grammar, matcher: LLMatcher) -> None:
        """matcher: at its beginning; owned."""
        self.grammar = grammar
        self._matcher = matcher

    def matcher(self) -> LLMatcher:
        """A matcher at the beginning, owned by the caller. It shares its lexer's states with all others, so that what
        one has found out is known to the next."""
        return self._matcher.deep_copy()


@dataclass(frozen=True, slots=True)
class GrammarStats:
    """Counts since the start."""

    compiled: int = 0
    cache_hits: int = 0
    refused: int = 0
    compile_seconds: float = 0.0
    """Of all that were compiled or refused, trials included."""


class GrammarCompiler:
    """Compiles in a thread of its own, after a trial in a process of its own (`TrialProcess`), one after the other.

    Neither is started before it is needed. All methods may be called from any thread.
    """

    def __init__(self, vocabulary: Callable[[], GrammarVocabulary], config: GrammarConfig) -> None:
        """vocabulary: called once, when the first grammar comes."""
        self._make_vocabulary = vocabulary
        self._config = config
        self._lock = threading.Lock()
        self._recent: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._alive: WeakValueDictionary[Grammar, CompiledGrammar] = WeakValueDictionary()
        """Those in `_recent`, and those that somebody holds."""
        self._spoiled: WeakSet[CompiledGrammar] = WeakSet()
        """Those of them that nobody new should take."""
        self._pending: dict[Grammar, Future[CompiledGrammar]] = {}
        self._queue: SimpleQueue[Grammar | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._trial: TrialProcess | None = None
        self._closed = False
        self._stats = GrammarStats()

    def check(self, grammar: Grammar) -> None:
        """Raises RequestError, field "grammar", where it can be seen that it will not do."""
        check_grammar(grammar, self._config)

    def find(self, grammar: Grammar) -> CompiledGrammar | None:
        """The grammar where it is compiled already, also one that is forgotten, for whoever still holds it."""
        with self._lock:
            return self._alive.get(grammar)

    def submit(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """The grammar, or a RequestError that says why not, as soon as it is known.

        Raises QueueFullError where too many others wait for theirs, EngineError after `close`.
        """
        with self._lock:
            found = self._alive.get(grammar)
            if found is not None and found not in self._spoiled:
                self._keep(found)
                self._count(cache_hits=1)
                return _done(found)
            if self._closed:
                raise EngineError("the engine was closed")
            waiting = self._pending.get(grammar)
            if waiting is not None:
                return waiting
            count, limit = len(self._pending), self._config.max_queued_grammars
            if count >= limit:
                message = f"{count} grammars wait to be compiled, the limit is {limit} (max_queued_grammars)"
                raise QueueFullError(f"{message}; try again later", reason="queued_grammars")
            future: Future[CompiledGrammar] = Future()
            self._pending[grammar] = future
            self._queue.put(grammar)
            if self._thread is None:
                self._thread = _thread_with_stack(self._run)
            return future

    def forget(self, grammar: Grammar) -> None:
        """Lets the next who submits the grammar have it compiled anew: its matchers share what they have learned, and
        with that a limit that one of them has reached."""
        with self._lock:
            self._recent.pop(grammar, None)
            found = self._alive.get(grammar)
            if found is not None:
                self._spoiled.add(found)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Waits for it. Raises RequestError."""
        return self.submit(grammar).result()

    def stats(self) -> GrammarStats:
        """A snapshot."""
        with self._lock:
            return self._stats

    def close(self) -> None:
        """Ends the process and the thread; who waits gets an EngineError. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread, trial = self._thread, self._trial
        if trial is not None:
            trial.close()  # so that the thread does not wait for it
        self._queue.put(None)
        if thread is not None:
            thread.join()
        for future in self._pending.values():
            future.set_exception(EngineError("the engine was closed"))
        self._pending.clear()

    @cached_property
    def _vocabulary(self) -> GrammarVocabulary:
        return self._make_vocabulary()

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return self._vocabulary.to_llguidance()

    def _fault(self, source: str) -> str:
        """What a trial says of a grammar; see `TrialProcess.fault`."""
        if self._trial is None:
            c = self._config
            trial = TrialProcess(self._vocabulary, c.max_grammar_seconds, c.max_grammar_mb, c.max_mask_ms)
            with self._lock:
                if self._closed:
                    raise EngineError("the engine was closed")
                self._trial = trial
        return self._trial.fault(source)

    def _run(self) -> None:
        while (grammar := self._queue.get()) is not None and not self._closed:
            started = time.perf_counter()
            # Not kept in a variable, which would hold it until the next one comes.
            self._finish(grammar, self._outcome(grammar), started)

    def _outcome(self, grammar: Grammar) -> CompiledGrammar | Exception:
        try:
            return self._compile(grammar)
        except BaseException as error:  # a panic in Rust is no Exception; who waits must hear of it all the same
            return error if isinstance(error, KvarnError) else EngineError(f"the grammar failed: {error}")

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        check_grammar(grammar, self._config)
        try:
            source = to_llguidance(grammar)
        except ValueError as error:
            raise RequestError(f"the grammar cannot be used: {error}", field="grammar") from None
        fault = self._fault(source)
        if fault:
            raise RequestError(f"the grammar {fault}", field="grammar")
        matcher = new_matcher(self._tokenizer, source)
        if matcher.is_error():
            raise RequestError(f"the grammar cannot be used: {cause(matcher)}", field="grammar")
        return CompiledGrammar(grammar, matcher)

    def _finish(self, grammar: Grammar, outcome: CompiledGrammar | Exception, started: float) -> None:
        seconds = time.perf_counter() - started
        with self._lock:
            if isinstance(outcome, Exception):
                self._count(refused=1, compile_seconds=seconds)
            else:
                self._count(compiled=1, compile_seconds=seconds)
                self._keep(outcome)
            future = self._pending.pop(grammar)
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _keep(self, compiled: CompiledGrammar) -> None:
        """As the most recently used one."""
        self._alive[compiled.grammar] = compiled
        self._recent[compiled.grammar] = compiled
        self._recent.move_to_end(compiled.grammar)
        while len(self._recent) > self._config.grammar_cache_entries:
            self._recent.popitem(last=False)

    def _count(self, **more: float) -> None:
        self._stats = GrammarStats(**{n: getattr(self._stats, n) + more.get(n, 0) for n in _COUNTS})


def _done(compiled: CompiledGrammar) -> Future[CompiledGrammar]:
    future: Future[CompiledGrammar] = Future()
    future.set_result(compiled)
    return future


_COUNTS = tuple(GrammarStats.__dataclass_fields__)


def _thread_with_stack(target: Callable[[], None]) -> threading.Thread:
    """A started thread with more stack than trials have, so that what they survive does not overflow it."""
    before = threading.stack_size(4 * STACK_BYTES)
    try:
        thread = threading.Thread(target=target, name="kvarn-grammars", daemon=True)
        thread.start()
    finally:
        threading.stack_size(before)
    return thread
