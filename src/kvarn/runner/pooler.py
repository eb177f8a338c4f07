"""`Pooler`: makes one vector of the hidden states of a prompt's tokens, as steps compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvarn.backends.reference.functions import layer_norm, rms_norm
from kvarn.program import Logits, Norm, Program, SelectRows
from kvarn.request import Pooling
from kvarn.step import NewSequence, PooledSequence, SchedulerOutput
from kvarn.tensors import TensorSource
from kvarn.tensors.dequantize import dequantize

Row = NDArray[np.float32]


class Pooler(Protocol):
    """Pools. Owned by one runner."""

    active: bool
    """Whether sequences may ask for it."""

    def add(self, sequence: NewSequence) -> None:
        """A sequence that will be in the next step."""
        ...

    def remove(self, sequence_id: int) -> None:
        """Forgets a sequence; unknown ones are ignored."""
        ...

    def take(self, scheduled: SchedulerOutput, values: Mapping[str, Row]) -> tuple[PooledSequence, ...]:
        """Reads what a step has computed; returns the vectors that are complete."""
        ...


class NullPooler:
    """Pools nothing."""

    active = False

    def add(self, sequence: NewSequence) -> None:
        """Nothing: the engine has refused what asks for it."""

    def remove(self, sequence_id: int) -> None:
        """Nothing."""

    def take(self, scheduled: SchedulerOutput, values: Mapping[str, Row]) -> tuple[PooledSequence, ...]:
        """Nothing."""
        del scheduled, values
        return ()


@dataclass(slots=True)
class _State:
    pooling: Pooling
    total: NDArray[np.float64]
    count: int = 0
    """Tokens in `total`, from the first."""


class HiddenStatePooler:
    """Pools the rows that the last layer leaves, each put through the program's last norm.

    Row by row, in order of position, in float64: so the vector does not depend on how the prompt was cut into chunks,
    nor on what else was in the steps.
    """

    active = True

    def __init__(self, program: Program, weights: TensorSource) -> None:
        """weights: of the program; the last norm's are read now."""
        self.buffer, self._norm = _last_norm(program, weights)
        """The buffer that every step must return."""
        self._width = program.buffer(self.buffer).width
        self._states: dict[int, _State] = {}

    def add(self, sequence: NewSequence) -> None:
        """See `Pooler`."""
        if sequence.pooling is not None:
            self._states[sequence.sequence_id] = _State(sequence.pooling, np.zeros(self._width))

    def remove(self, sequence_id: int) -> None:
        """See `Pooler`."""
        self._states.pop(sequence_id, None)

    def take(self, scheduled: SchedulerOutput, values: Mapping[str, Row]) -> tuple[PooledSequence, ...]:
        """See `Pooler`."""
        if not self._states:
            return ()
        rows, begin, done = values[self.buffer], 0, list[PooledSequence]()
        for part in scheduled.sequences:
            state = self._states.get(part.sequence_id)
            if state is not None:
                own = rows[begin : begin + len(part.token_ids)]
                if state.pooling is Pooling.MEAN:
                    self._add(state, part.start, own)
                if part.sample:
                    vector = state.total / state.count if state.count else self._norm(own[-1])
                    done.append(PooledSequence(part.sequence_id, tuple(vector.astype(np.float32).tolist())))
            begin += part.num_rows
        return tuple(done)

    def _add(self, state: _State, start: int, rows: Row) -> None:
        # After a preemption tokens come a second time.
        for row in rows[max(0, state.count - start) :]:
            state.total += self._norm(row)
            state.count += 1


def _last_norm(program: Program, weights: TensorSource) -> tuple[str, Callable[[Row], Row]]:
    """The buffer that the last layer leaves, and what becomes of each of its rows before the logits."""
    tail = list(program.ops)
    select = max(place for place, op in enumerate(tail) if isinstance(op, SelectRows))
    source, between = tail[select], tail[select + 1 :]
    assert isinstance(source, SelectRows)
    norms = [op for op in between if isinstance(op, Norm)]
    if len(between) != 2 or len(norms) != 1 or not isinstance(between[1], Logits):
        raise ValueError(f"{program.name}: one norm is known between the last layer and the logits")
    norm = norms[0]
    weight = dequantize(weights.tensor(norm.weight))
    bias = None if norm.bias is None else dequantize(weights.tensor(norm.bias))
    if norm.norm == "rms":
        return source.x, lambda row: rms_norm(row, weight, norm.eps)
    return source.x, lambda row: layer_norm(row, weight, bias, norm.eps)
