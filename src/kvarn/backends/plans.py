"""`Plans`: the compiled steps of an executable, one for each set of buffers that somebody asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from kvarn.errors import EngineError
from kvarn.program import Program

P = TypeVar("P")
MAX_VARIANTS = 4
"""Plans kept beside the main one: each set of extra outputs has its own, with activations of its own."""


class Plans(Generic[P]):
    """Owns the plan that returns what every step does, made at once, and the last few that return more."""

    def __init__(self, program: Program, always: Sequence[str], build: Callable[[tuple[str, ...]], P]) -> None:
        """always: buffers that every step returns beside the program's output. build: the plan that returns more."""
        self._program = program
        self._always = frozenset((program.output, *always))
        self._build = build
        self._main: P | None = build(())
        self._variants: dict[tuple[str, ...], P] = {}

    def __iter__(self) -> Iterator[P]:
        """All that are kept, the main one first."""
        if self._main is not None:
            yield self._main
        yield from self._variants.values()

    @property
    def main(self) -> P:
        """What steps run that ask for nothing more. Raises EngineError once closed."""
        if self._main is None:
            raise EngineError("the executable is closed")
        return self._main

    def returning(self, outputs: Sequence[str]) -> P:
        """The plan whose steps return these buffers, too. Raises EngineError once closed, ValueError for a buffer that
        the program does not have."""
        main, more = self.main, tuple(sorted(set(outputs) - self._always))
        if not more:
            return main
        if more not in self._variants:
            for name in more:
                try:
                    self._program.buffer(name)
                except KeyError:
                    raise ValueError(f"the program has no buffer {name!r}") from None
            if len(self._variants) >= MAX_VARIANTS:
                self._variants.pop(next(iter(self._variants)))
            self._variants[more] = self._build(more)
        return self._variants[more]

    def close(self) -> None:
        """Drops all. Idempotent."""
        self._main = None
        self._variants.clear()
