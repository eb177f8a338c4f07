"""A program as text, one op a line: what ARCHITECTURE.md shows and `kvarn plan --program` prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from kvarn.program.ops import KvWrite, Op, RopeTable
from kvarn.program.program import Program, buffers_read, weights_read

NAMES = frozenset({"out", "layer"})


def op_line(program: Program, op: Op) -> str:
    """`kind  out[rows, width] <- inputs, weights[shape]  (attributes)`."""
    if isinstance(op, KvWrite):
        target = f"kv[{op.layer}]"
    else:
        buffer = program.buffer(op.out)
        target = f"{buffer.name}[{buffer.rows.value}, {buffer.width}]"
    sources = list(buffers_read(op))
    if hasattr(op, "layer") and not isinstance(op, KvWrite):
        sources.append(f"kv[{op.layer}]")
    for name in weights_read(op):
        sources.append(f"{name}[{', '.join(map(str, program.weight(name).shape))}]")
    line = f"{op.kind:<17} {target:<18} <- {', '.join(sources)}"
    attributes = ", ".join(_attributes(op, set(buffers_read(op)) | set(weights_read(op))))
    return f"{line}  ({attributes})" if attributes else line


def listing(program: Program, ops: Iterable[Op] | None = None) -> str:
    """All ops of the program (or the given ones of it), one a line."""
    return "\n".join(op_line(program, op) for op in (program.ops if ops is None else ops))


def _attributes(op: Op, names: set[str]) -> Iterable[str]:
    for field in fields(op):
        value = getattr(op, field.name)
        if field.name in NAMES or value is None or (isinstance(value, str) and value in names):
            continue
        if isinstance(value, RopeTable):
            yield f"{value.style}, {value.rotary_dim} of the head rotated"
        elif isinstance(value, float):
            yield f"{field.name}={value:g}"
        else:
            yield f"{field.name}={value}"
