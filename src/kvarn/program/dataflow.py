"""Which op made a value and who reads it: buffers that a program writes several times become one value per write."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from kvarn.program import Program, ops
from kvarn.program.program import buffers_read


@dataclass(slots=True, eq=False)
class Value:
    """What one op wrote into a buffer. Compared by identity."""

    name: str
    width: int
    producer: int
    """Index of the op."""
    readers: list[int] = field(default_factory=list)
    wanted: bool = False
    """It is returned to the caller, so it must exist as float32 rows."""

    @property
    def only_reader(self) -> int | None:
        """The op that alone reads it, where nobody else wants it."""
        return self.readers[0] if len(self.readers) == 1 and not self.wanted else None


@dataclass(frozen=True, slots=True)
class Dataflow:
    """Values read and written by each op of a program. outputs: the last value of every wanted buffer."""

    read: tuple[tuple[Value, ...], ...]
    """In the order of the op's buffer fields."""
    written: tuple[Value | None, ...]
    outputs: dict[str, Value]


def analyse(program: Program, wanted: Collection[str]) -> Dataflow:
    """The dataflow of a program whose buffers `wanted` (and its output) are to be returned."""
    widths = {buffer.name: buffer.width for buffer in program.buffers}
    latest: dict[str, Value] = {}
    read: list[tuple[Value, ...]] = []
    written: list[Value | None] = []
    for index, op in enumerate(program.ops):
        values = tuple(latest[name] for name in buffers_read(op))
        for value in values:
            value.readers.append(index)
        read.append(values)
        if isinstance(op, ops.KvWrite):
            written.append(None)
            continue
        value = Value(op.out, widths[op.out], index)
        latest[op.out] = value
        written.append(value)
    outputs = {name: latest[name] for name in (program.output, *wanted)}
    for value in outputs.values():
        value.wanted = True
    return Dataflow(tuple(read), tuple(written), outputs)
