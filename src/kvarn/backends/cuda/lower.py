"""Programs to launches. What is fused is decided here; anything unusual runs op by op.

Fused are: an add with the norm behind it; linears that read the same rows, into one matrix (queries, keys and values;
gate and up); rotations with the writing of keys and values. What one op alone reads may be overwritten by it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import assert_never

from kvarn.backends.cuda.forms import MatrixForm
from kvarn.backends.cuda.launches import (
    ActivationLaunch,
    AddLaunch,
    AttentionLaunch,
    EmbedLaunch,
    GatedLaunch,
    InputLaunch,
    Launch,
    LinearLaunch,
    LogitsLaunch,
    Lowered,
    NormLaunch,
    Place,
    PositionLaunch,
    RopeLaunch,
    SelectLaunch,
    View,
)
from kvarn.program import Program, ops
from kvarn.program.dataflow import Value, analyse


def lower(program: Program, forms: Mapping[str, MatrixForm], wanted: Collection[str] = ()) -> Lowered:
    """The launches of a program whose buffers `wanted` are returned beside its output. Pure.

    forms: of the weights that may be one matrix with others of the same form. Raises KeyError where `wanted` names no
    buffer.
    """
    for name in wanted:
        program.buffer(name)
    return _Lowering(program, forms, wanted).run()


class _Lowering:
    def __init__(self, program: Program, forms: Mapping[str, MatrixForm], wanted: Collection[str]) -> None:
        self._program = program
        self._forms = forms
        self._flow = analyse(program, wanted)
        self._rows = {buffer.name: buffer.rows for buffer in program.buffers}
        self._views: dict[Value, View] = {}
        self._done: set[int] = set()
        self._launches: list[Launch] = []
        self._ropes: dict[Value, tuple[int, ops.Rope]] = {}
        """Rotations that wait for the cache's write, which they become part of; by what they make."""

    def run(self) -> Lowered:
        for index, op in enumerate(self._program.ops):
            if index in self._done:
                continue
            if isinstance(op, ops.KvWrite):
                self._kv_write(index, op)
                continue
            for value in self._flow.read[index]:
                self._flush(value)
            self._op(index, op)
        for value in list(self._ropes):
            self._flush(value)
        return Lowered(tuple(self._launches), {name: self._views[v] for name, v in self._flow.outputs.items()})

    # Values and views

    def _new(self, value: Value, float32: bool = False) -> View:
        view = View(Place(self._rows[value.name], value.width, float32), 0, value.width)
        self._views[value] = view
        return view

    def _over(self, old: Value, new: Value, index: int) -> View:
        """Where op `index` puts `new`, which it makes of each row of `old`: in its place where nobody else reads it."""
        if old.only_reader == index:
            self._views[new] = self._views[old]
            return self._views[old]
        return self._new(new)

    def _read(self, index: int) -> list[View]:
        return [self._views[value] for value in self._flow.read[index]]

    # Ops

    def _op(self, index: int, op: ops.Op) -> None:
        out, values = self._flow.written[index], self._flow.read[index]
        assert out is not None
        x = [self._views[value] for value in values]
        match op:
            case ops.Input():
                self._launches.append(InputLaunch(self._new(out), op.out))
            case ops.Embed():
                self._launches.append(EmbedLaunch(self._new(out), op.weight, op.scale))
            case ops.PositionEmbed():
                self._launches.append(PositionLaunch(self._over(values[0], out, index), x[0], op.weight))
            case ops.Norm():
                self._launches.append(_norm(op, self._over(values[0], out, index), x[0]))
            case ops.Linear():
                self._linears(index)
            case ops.Rope():
                self._ropes[out] = index, op
            case ops.Attention():
                self._launches.append(
                    AttentionLaunch(self._new(out), x[0], op.layer, op.heads, op.head_dim, op.scale, op.window,
                                    op.softcap)
                )  # fmt: skip
            case ops.Activation():
                self._launches.append(ActivationLaunch(self._over(values[0], out, index), x[0], op.function))
            case ops.GatedActivation():
                self._launches.append(GatedLaunch(self._new(out), x[0], x[1], op.function))
            case ops.Add():
                self._add(index, out, x)
            case ops.SelectRows():
                self._launches.append(SelectLaunch(self._new(out), x[0]))
            case ops.Logits():
                view = self._new(out, float32=True)
                self._launches.append(LogitsLaunch(view, x[0], op.weight, op.bias, op.scale, op.softcap))
            case ops.KvWrite():
                raise AssertionError("written by _kv_write")
            case _:
                assert_never(op)

    def _add(self, index: int, out: Value, x: list[View]) -> None:
        """With the norm of the sum, where that is what comes next."""
        summed = self._new(out)
        following = index + 1
        op = self._program.ops[following] if following < len(self._program.ops) else None
        if isinstance(op, ops.Norm) and op.groups == 1 and self._flow.read[following][0] is out:
            normed = self._flow.written[following]
            assert normed is not None
            self._done.add(following)
            self._launches.append(_norm(op, self._new(normed), x[0], x[1], summed))
        else:
            self._launches.append(AddLaunch(summed, x[0], x[1]))

    def _linears(self, first: int) -> None:
        """The linear at `first`, and those behind it that read the same rows, as one matrix."""
        members = [first]
        for index in range(first + 1, len(self._program.ops)):
            if not self._joins(first, index):
                break
            members.append(index)
        values = [self._written(index) for index in members]
        linears = [self._linear(index) for index in members]
        place = Place(self._rows[values[0].name], sum(value.width for value in values))
        start = 0
        for value in values:
            self._views[value] = View(place, start, value.width)
            start += value.width
        self._done.update(members)
        biases = tuple(op.bias for op in linears if op.bias is not None)
        x = self._views[self._flow.read[first][0]]
        self._launches.append(
            LinearLaunch(View(place, 0, place.width), x, tuple(op.weight for op in linears), biases)
        )

    def _joins(self, first: int, index: int) -> bool:
        op, other = self._linear(first), self._program.ops[index]
        return (
            isinstance(other, ops.Linear)
            and self._flow.read[index][0] is self._flow.read[first][0]
            and (other.bias is None) == (op.bias is None)
            and op.weight in self._forms
            and self._forms[op.weight] == self._forms.get(other.weight)
        )

    def _linear(self, index: int) -> ops.Linear:
        op = self._program.ops[index]
        assert isinstance(op, ops.Linear)
        return op

    def _written(self, index: int) -> Value:
        value = self._flow.written[index]
        assert value is not None
        return value

    # Rotations and the cache

    def _flush(self, value: Value) -> None:
        """Launches a rotation that waits, since somebody is about to read what it makes."""
        if value not in self._ropes:
            return
        index, op = self._ropes.pop(value)
        old = self._flow.read[index][0]
        x = self._views[old]
        self._launches.append(RopeLaunch(self._over(old, value, index), x, op.heads, op.head_dim, op.table))

    def _kv_write(self, index: int, op: ops.KvWrite) -> None:
        """Writes keys and values: the keys rotated on the way, and one other thing that the same table rotates."""
        key, value = self._flow.read[index]
        self._flush(value)
        rope = self._ropes[key] if key in self._ropes and key.only_reader == index else None
        if rope is None:
            self._flush(key)
            k, v = self._read(index)
            self._launches.append(RopeLaunch(None, None, 0, 0, None, op.layer, k, v))
            return
        del self._ropes[key]
        k, v = self._views[self._flow.read[rope[0]][0]], self._views[value]
        for made, (other_index, other) in self._ropes.items():
            if other.table == rope[1].table and other.head_dim == rope[1].head_dim:
                del self._ropes[made]
                old = self._flow.read[other_index][0]
                x = self._views[old]
                out = self._over(old, made, other_index)
                self._launches.append(
                    RopeLaunch(out, x, other.heads, other.head_dim, other.table, op.layer, k, v, rotate_keys=True)
                )
                return
        self._launches.append(
            RopeLaunch(None, None, 0, rope[1].head_dim, rope[1].table, op.layer, k, v, rotate_keys=True)
        )


def _norm(op: ops.Norm, out: View, x: View, residual: View | None = None, summed: View | None = None) -> NormLaunch:
    return NormLaunch(out, x, residual, summed, op.weight, op.bias, op.eps, op.norm, op.groups)
