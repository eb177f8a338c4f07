"""Trying grammars in a process of their own, which may take its time, eat its memory or crash.

llguidance bounds most of what a grammar can cost, but not all of it: 20,000 rules each of which refers to the next one
overflow the stack, and compiling cannot be interrupted. So a grammar that nobody has sent before is first compiled in
this process (`python -m kvarn.grammar.trial`), and a few masks of it are computed; where that does not end well the
process is killed, and the grammar refused.

On the way in are pickled messages: a `GrammarVocabulary` without encoder and the megabytes of memory, once, then
(grammar as llguidance reads it, milliseconds for a mask) for each trial. On the way out is a line of JSON for each
trial: what is wrong with the grammar, "" for nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import sys
import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import kvarn
from kvarn.errors import EngineError
from kvarn.grammar.vocabulary import GrammarVocabulary, cause, new_matcher

if TYPE_CHECKING:
    import subprocess

    from llguidance import LLMatcher, LLTokenizer

STACK_BYTES = 4 << 20
"""Of the thread that compiles on trial; where it is done in earnest the stack is four times that."""
START_SECONDS = 60
WALK = 12
"""Tokens that a trial goes into a grammar, each with a mask."""
NICE = 10
"""What is asked for now comes before what is only tried."""


class TrialProcess:
    """The process, started with the first trial and again after it was killed. For one thread, but for `close`."""

    def __init__(self, vocabulary: GrammarVocabulary, max_seconds: float, max_mb: int, max_mask_ms: float) -> None:
        """See `GrammarConfig`."""
        self._greeting = GrammarVocabulary(vocabulary.tokens, vocabulary.special, vocabulary.ends), max_mb
        self._max_seconds = max_seconds
        self._max_mb = max_mb
        self._max_mask_ms = max_mask_ms
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._answers: SimpleQueue[bytes] = SimpleQueue()

    def fault(self, source: str) -> str:
        """What is wrong with the grammar, a part of a sentence; "" for nothing. Raises EngineError where the process
        does not start."""
        self._start()
        answer: bytes | None
        try:
            self._send((source, self._max_mask_ms))
            answer = self._answers.get(timeout=self._max_seconds)
        except BrokenPipeError:
            answer = b""
        except Empty:
            answer = None
        if answer:
            return str(json.loads(answer))
        self._kill()
        if self._closed:
            raise EngineError("the engine was closed")
        if answer is None:
            return f"takes longer than {self._max_seconds:g} s to compile (max_grammar_seconds)"
        return f"is too deep, or takes more than {self._max_mb} MiB to compile (max_grammar_mb)"

    def close(self) -> None:
        """Ends the process and the trial that is in it, which raises EngineError. Any thread may call. Idempotent."""
        self._closed = True
        self._kill()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()

    def _start(self) -> None:
        """Starts the process where there is none, and waits until it is ready, which does not count."""
        import subprocess

        if self._process is not None:
            return
        folder = str(Path(kvarn.__file__).parents[1])
        path = os.pathsep.join(part for part in (folder, os.environ.get("PYTHONPATH", "")) if part)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvarn.grammar.trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the parent, which then closes this one's stdin
        )
        if self._closed:
            self._kill()
            raise EngineError("the engine was closed")
        self._answers = SimpleQueue()
        threading.Thread(target=_read, args=(self._process, self._answers), name="kvarn-trial", daemon=True).start()
        try:
            self._send(self._greeting)
            ready = self._answers.get(timeout=START_SECONDS)
        except (BrokenPipeError, Empty):
            ready = b""
        if not ready:
            self._kill()
            raise EngineError("the process that tries grammars does not start")

    def _send(self, message: object) -> None:
        process = self._process
        if process is None or process.stdin is None:
            raise BrokenPipeError
        try:
            process.stdin.write(pickle.dumps(message))
            process.stdin.flush()
        except ValueError:  # closed meanwhile
            raise BrokenPipeError from None


def _read(process: subprocess.Popen[bytes], answers: SimpleQueue[bytes]) -> None:
    """Passes lines on; b"" is the end."""
    assert process.stdout is not None
    line = b"\n"
    while line:
        try:
            line = process.stdout.readline()
        except ValueError:  # closed meanwhile
            line = b""
        answers.put(line)


def try_grammar(tokenizer: LLTokenizer, source: str, max_mask_ms: float) -> str:
    """What is wrong with a grammar, "" for nothing. May crash the process, or never return."""
    matcher = new_matcher(tokenizer, source)
    if matcher.is_error():
        return f"cannot be used: {cause(matcher)}"
    if matcher.is_stopped() and not matcher.is_accepting():
        return "allows nothing"
    chance = random.Random(0)
    for _ in range(WALK):
        started = time.perf_counter()
        mask = matcher.compute_bitmask()
        took = (time.perf_counter() - started) * 1000
        if matcher.is_error():
            return _gave_up(matcher)
        if took > max_mask_ms:
            return f"takes {took:.0f} ms for the tokens of one place; the limit is {max_mask_ms:g} (max_mask_ms)"
        token = _any_of(mask, chance)
        if token is None:
            return "allows nothing"
        if matcher.is_stopped() or token in tokenizer.eos_tokens:
            break
        if not matcher.consume_token(token):
            return _gave_up(matcher)
    return ""


def _gave_up(matcher: LLMatcher) -> str:
    why = cause(matcher)
    return "allows nothing" if why.startswith("NoExtension") else f"is too complex: {why}"


def _any_of(mask: bytes, chance: random.Random) -> int | None:
    """A token that a mask allows, not each with the same chance; None where it allows none."""
    places = [place for place, byte in enumerate(mask) if byte]
    if not places:
        return None
    place = chance.choice(places)
    return 8 * place + chance.choice([bit for bit in range(8) if mask[place] >> bit & 1])


def main() -> None:
    """Serves one parent until it closes stdin."""
    import resource

    vocabulary, max_mb = pickle.load(sys.stdin.buffer)
    tokenizer = vocabulary.to_llguidance()
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (max_mb << 20, max_mb << 20))
    _answer("ready")
    while True:
        try:
            source, max_mask_ms = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        _answer(try_grammar(tokenizer, source, max_mask_ms))


def _answer(text: str) -> None:
    sys.stdout.write(json.dumps(text) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
