"""An engine that takes a step only when a test lets it, so that a test knows where in an answer it stands."""

import asyncio
import contextlib
import threading

from tiny_engine import Wrapper, handmade_engine

from kvarn.engine import AsyncLLM

PATIENCE = 30.0
"""Seconds after which a wait that no healthy machine needs fails, so that a broken test ends."""


class Gate(Wrapper):
    """An executable whose every step stands still until the test allows it."""

    def __init__(self, inner) -> None:
        super().__init__(inner)
        self._changed = threading.Condition()
        self._begun = 0
        self._allowed = 0
        self._open = False

    def execute(self, batch, outputs=()):
        with self._changed:
            self._begun += 1
            step = self._begun
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._open or step <= self._allowed)
        return self.inner.execute(batch, outputs)

    @property
    def begun(self) -> int:
        """Steps that have begun; where they are more than the allowed ones, the engine stands inside the last."""
        with self._changed:
            return self._begun

    def stand_in_step(self, number: int) -> None:
        """Lets the steps before this one pass, and returns when the engine stands inside it."""
        with self._changed:
            self._allowed = number - 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._begun == number, PATIENCE), f"step {number} does not begin"

    def finish_step(self) -> None:
        """Lets the step pass in which the engine stands, and none after it."""
        with self._changed:
            self._allowed = self._begun
            self._changed.notify_all()

    def hold(self) -> None:
        """Lets no step begin from now on; the one in which the engine is goes on."""
        with self._changed:
            self._open, self._allowed = False, self._begun

    def open(self) -> None:
        """Lets all steps pass from now on."""
        with self._changed:
            self._open = True
            self._changed.notify_all()


class Broken(Wrapper):
    """An executable that fails as often as it is told to."""

    failures = 0
    error: type[BaseException] = RuntimeError

    def execute(self, batch, outputs=()):
        if self.failures:
            self.failures -= 1
            raise self.error("secret detail: the kernel is broken")
        return self.inner.execute(batch, outputs)


@contextlib.contextmanager
def gated_llm(wrap=lambda executable: executable, **options):
    """An AsyncLLM and the gate before its steps. wrap: what is to be behind the gate, around the executable."""
    gates: list[Gate] = []

    def gated(executable):
        gates.append(Gate(wrap(executable)))
        return gates[0]

    llm = AsyncLLM(handmade_engine(wrap_executable=gated, **options))
    try:
        yield llm, gates[0]
    finally:
        gates[0].open()
        asyncio.run(llm.close())
