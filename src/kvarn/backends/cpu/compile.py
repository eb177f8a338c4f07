"""Programs to stages: neighbours are fused where their values have no other reader; anything unusual runs op by op.

What is fused: linears that read the same rows (one stage; their input is normed and quantized once), gate and up with
their activation, a linear with its bias, activation and residual, and attention with the norm and rotation of its heads
and the cache's writes. What a linear reads alone is handed over as int8 where its producer can make it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import assert_never

from kvarn.backends.cpu.stages import (
    ActivationStage,
    AddStage,
    AttentionStage,
    EmbedStage,
    GatedStage,
    HeadSpec,
    InputStage,
    Job,
    KvWriteStage,
    LinearStage,
    NormSpec,
    NormStage,
    Place,
    PositionStage,
    Recipe,
    RopeStage,
    SelectStage,
    Stage,
    StageList,
)
from kvarn.program import Program, RopeTable, Rows, ops
from kvarn.program.dataflow import Value, analyse
from kvarn.tensors import DType

GROUP = 32


def compile_program(program: Program, dtypes: Mapping[str, DType], wanted: Collection[str] = ()) -> StageList:
    """The stages of a program whose buffers `wanted` are returned beside its output. dtypes: of each weight.

    Pure: depends on nothing else. Raises KeyError where `wanted` names no buffer of the program.
    """
    for name in wanted:
        program.buffer(name)
    return _Compiler(program, dtypes, wanted).run()


@dataclass(slots=True)
class _Lin:
    """A linear on its way into a stage: its op, the job so far, the value that the job ends in."""

    op: ops.Linear | ops.Logits
    job: Job
    value: Value
    residual: Value | None = None
    taken: list[int] = field(default_factory=list)
    """Ops that the job took in."""


@dataclass(slots=True)
class _Head:
    """What was found before attention's queries or keys."""

    raw: Value
    norm: ops.Norm | None = None
    rope: ops.Rope | None = None
    fused: list[int] = field(default_factory=list)


class _Compiler:
    def __init__(self, program: Program, dtypes: Mapping[str, DType], wanted: Collection[str]) -> None:
        self.program = program
        self.dtypes = dtypes
        self.flow = analyse(program, wanted)
        self.rows = {buffer.name: buffer.rows for buffer in program.buffers}
        self.done: set[int] = set()
        """Ops that a stage takes care of, made already or still to be made."""
        self.executed: set[int] = set()
        """Ops whose stage has been made: what only they read may be overwritten."""
        self.stages: list[Stage] = []
        self.floats: dict[Value, Place] = {}
        self.quants: dict[Value, Place] = {}
        self.recipes: dict[Value, tuple[Value, NormSpec]] = {}
        """Normed values that exist only as the int8 input of linears: what is normed, and how."""
        self.attentions = self._find_attentions()

    def run(self) -> StageList:
        for index in range(len(self.program.ops)):
            if index not in self.done:
                self._op(index)
        outputs = {name: self.floats[value] for name, value in self.flow.outputs.items()}
        inputs = {stage.name: stage.out for stage in self.stages if isinstance(stage, InputStage)}
        return StageList(tuple(self.stages), outputs, inputs)

    # Values and places

    def _new(self, value: Value, quantized: bool = False) -> Place:
        place = Place(self.rows[value.name], value.width, quantized)
        (self.quants if quantized else self.floats)[value] = place
        return place

    def _over(self, old: Value, new: Value, index: int) -> Place:
        """The place of `new`, which op `index` makes of `old` element by element: in place where none needs `old`."""
        others = (reader for reader in old.readers if reader != index)
        if not new.wanted and not old.wanted and all(reader in self.executed for reader in others):
            self.floats[new] = self.floats[old]
            return self.floats[new]
        return self._new(new)

    def _quantized_linear(self, index: int) -> bool:
        op = self.program.ops[index]
        return isinstance(op, ops.Linear | ops.Logits) and self.dtypes[op.weight].quantized

    def _read_as_int8(self, value: Value) -> bool:
        """Whether all that read the value are quantized linears next to one another."""
        if value.wanted or not value.readers or value.width % GROUP:
            return False
        return all(self._quantized_linear(reader) for reader in value.readers) and self._adjacent(value.readers)

    def _adjacent(self, readers: list[int]) -> bool:
        """True where the linears will be one stage: only linears (or what fuses into them) lie between."""
        between = range(min(readers), max(readers) + 1)
        return all(isinstance(self.program.ops[i], ops.Linear | ops.Logits) for i in between)

    # Single ops

    def _op(self, index: int) -> None:
        op = self.program.ops[index]
        read, out = self.flow.read[index], self.flow.written[index]
        if isinstance(op, ops.Linear | ops.Logits):
            self._linears(index)
            return
        if isinstance(op, ops.Attention):
            self._attention(index, op)
            return
        if isinstance(op, ops.KvWrite):
            k, v = (self.floats[value] for value in read)
            self.stages.append(KvWriteStage(op.layer, k, v))
            self.executed.add(index)
            return
        assert out is not None
        if isinstance(op, ops.Norm) and self._read_as_int8(out):
            self.recipes[out] = (read[0], _norm(op))
            return
        x = tuple(self.floats[value] for value in read)
        made = isinstance(op, ops.Input | ops.Embed | ops.SelectRows)
        place = self._new(out) if made else self._over(read[0], out, index)
        self.stages.append(_plain_stage(op, x, place))
        self.executed.add(index)

    # Linears

    def _linears(self, first: int) -> None:
        """The linear at `first` and its neighbours that read the same value, in one stage."""
        source = self.flow.read[first][0]
        quantized = self._quantized_linear(first)
        members = []
        for index in range(first, len(self.program.ops)):
            op = self.program.ops[index]
            if not isinstance(op, ops.Linear | ops.Logits):
                break
            same = self.flow.read[index][0] is source and self._quantized_linear(index) == quantized
            if same and index not in self.done:
                members.append(index)
        self.done.update(members)
        jobs: list[_Lin] = []
        for index in members:
            lin = self._lin(index)
            if not self._pair(jobs, lin):
                jobs.append(lin)
        for lin in jobs:
            self._follow(lin)
        self.stages.append(self._linear_stage(source, quantized, jobs))
        self.executed.update(members, *(lin.taken for lin in jobs))
        if source in self.recipes:
            self.executed.add(source.producer)

    def _lin(self, index: int) -> _Lin:
        op, value = self.program.ops[index], self.flow.written[index]
        assert isinstance(op, ops.Linear | ops.Logits) and value is not None
        if isinstance(op, ops.Logits):
            return _Lin(op, Job(op.weight, op.bias, scale=op.scale, softcap=op.softcap or 0.0), value)
        return _Lin(op, Job(op.weight, op.bias), value)

    def _pair(self, jobs: list[_Lin], up: _Lin) -> bool:
        """Joins `up` to the job whose result gates it; False where there is none."""
        reader = up.value.only_reader
        gated = None if reader is None else self.program.ops[reader]
        if not isinstance(gated, ops.GatedActivation) or not isinstance(up.op, ops.Linear):
            return False
        assert reader is not None
        gate_value, up_value = self.flow.read[reader]
        for lin in jobs:
            if lin.value is gate_value and lin.value.only_reader == reader and up_value is up.value:
                result = self.flow.written[reader]
                assert result is not None
                job = Job(lin.job.weight, lin.job.bias, up.job.weight, up.job.bias, gated.function)
                lin.job, lin.value = job, result
                self._take(lin, reader)
                return True
        return False

    def _follow(self, lin: _Lin) -> None:
        """Takes the activation and the sum that follow a linear into its job."""
        if isinstance(lin.op, ops.Logits):
            return
        reader = lin.value.only_reader
        if reader is not None and lin.job.up is None:
            op, result = self.program.ops[reader], self.flow.written[reader]
            if isinstance(op, ops.Activation) and result is not None:
                lin.job, lin.value = replace(lin.job, function=op.function), result
                self._take(lin, reader)
                reader = lin.value.only_reader
        if reader is not None:
            op, result = self.program.ops[reader], self.flow.written[reader]
            if isinstance(op, ops.Add) and result is not None:
                a, b = self.flow.read[reader]
                other = b if a is lin.value else a
                if other is not lin.value and other in self.floats:
                    lin.job, lin.value = replace(lin.job, residual=self.floats[other]), result
                    lin.residual = other
                    self._take(lin, reader)

    def _take(self, lin: _Lin, index: int) -> None:
        lin.taken.append(index)
        self.done.add(index)

    def _linear_stage(self, source: Value, quantized: bool, jobs: list[_Lin]) -> LinearStage:
        done = []
        for lin in jobs:
            as_int8 = lin.job.up is not None and self._read_as_int8(lin.value)
            out = None
            if lin.residual is not None:
                out = self._over(lin.residual, lin.value, lin.value.producer)
            elif not as_int8:
                out = self._new(lin.value)
            done.append(replace(lin.job, out=out, quants=self._new(lin.value, True) if as_int8 else None))
        label = jobs[0].op.weight.removesuffix(".weight").rpartition(".")[2]
        if not quantized:
            return LinearStage(label, self.floats[source], None, None, tuple(done))
        if source in self.quants:
            return LinearStage(label, None, self.quants[source], None, tuple(done))
        if source in self.recipes:
            x, norm = self.recipes[source]
            recipe = Recipe(self.floats[x], norm)
        else:
            recipe = Recipe(self.floats[source], None)
        return LinearStage(label, None, Place(self.rows[source.name], source.width, True), recipe, tuple(done))

    # Attention

    def _find_attentions(self) -> dict[int, tuple[int, _Head, _Head, Value]]:
        """Attentions that take in what is before them: index → (kv_write's index, queries, keys, values)."""
        found = {}
        for index, op in enumerate(self.program.ops):
            before = self.program.ops[index - 1] if index else None
            if not isinstance(op, ops.Attention) or not isinstance(before, ops.KvWrite) or before.layer != op.layer:
                continue
            k_value, v_value = self.flow.read[index - 1]
            q = self._head(self.flow.read[index][0], index, op.heads, op.head_dim)
            k = self._head(k_value, index - 1, op.kv_heads, op.head_dim)
            found[index] = (index - 1, q, k, v_value)
            self.done.update((index - 1, *q.fused, *k.fused))
        return found

    def _head(self, value: Value, reader: int, heads: int, head_dim: int) -> _Head:
        """Walks back over rotation and norm of heads whose values nobody else reads."""
        head = _Head(value)
        op = self.program.ops[value.producer]
        if isinstance(op, ops.Rope) and value.only_reader == reader and (op.heads, op.head_dim) == (heads, head_dim):
            head.rope, reader = op, value.producer
            head.fused.append(reader)
            value = head.raw = self.flow.read[reader][0]
            op = self.program.ops[value.producer]
        if isinstance(op, ops.Norm) and value.only_reader == reader and op.groups == heads:
            head.norm, reader = op, value.producer
            head.fused.append(reader)
            value = head.raw = self.flow.read[reader][0]
        if head.fused and (value.only_reader != reader or not self._plain_rows(value)):
            return _Head(self._original(head))  # heads are prepared in place, so the raw rows must be nobody else's
        return head

    def _plain_rows(self, value: Value) -> bool:
        return isinstance(self.program.ops[value.producer], ops.Linear)

    def _original(self, head: _Head) -> Value:
        value = self.flow.written[head.fused[0]]
        assert value is not None
        return value

    def _attention(self, index: int, op: ops.Attention) -> None:
        out = self.flow.written[index]
        assert out is not None
        layer = self.program.kv_layers[op.layer]
        fused = self.attentions.get(index)
        if fused is None:
            q, k, v = HeadSpec(self.floats[self.flow.read[index][0]]), None, None
        else:
            _, q_head, k_head, v_value = fused
            q, k, v = self._head_spec(q_head), self._head_spec(k_head), self.floats[v_value]
        self.executed.update((index, *(() if fused is None else (fused[0], *fused[1].fused, *fused[2].fused))))
        columns = op.heads // op.kv_heads * layer.value_dim
        as_int8 = columns % GROUP == 0 and self._read_as_int8(out)
        self.stages.append(
            AttentionStage(
                layer=op.layer, q=q, k=k, v=v, heads=op.heads, scale=op.scale, softcap=op.softcap or 0.0,
                window=op.window or 0, out=self._new(out), quants=self._new(out, True) if as_int8 else None,
                partials=Place(Rows.TOKENS, 0),
            )
        )  # fmt: skip

    def _head_spec(self, head: _Head) -> HeadSpec:
        norm = None if head.norm is None else _norm(head.norm)
        rope: RopeTable | None = None if head.rope is None else head.rope.table
        return HeadSpec(self.floats[head.raw], norm, rope)


def _norm(op: ops.Norm) -> NormSpec:
    return NormSpec(op.weight, op.bias, op.eps, op.norm == "layer", op.groups)


_Plain = (
    ops.Input | ops.Embed | ops.PositionEmbed | ops.Norm | ops.Rope | ops.Activation | ops.GatedActivation | ops.Add
    | ops.SelectRows
)  # fmt: skip


def _plain_stage(op: _Plain, x: tuple[Place, ...], out: Place) -> Stage:
    """The stage of an op that nothing was fused with."""
    match op:
        case ops.Input():
            return InputStage(op.out, out)
        case ops.Embed():
            return EmbedStage(op.weight, out, op.scale)
        case ops.PositionEmbed():
            return PositionStage(op.weight, x[0], out)
        case ops.Norm():
            return NormStage(_norm(op), x[0], out)
        case ops.Rope():
            return RopeStage(op.table, x[0], out, op.heads)
        case ops.Activation():
            return ActivationStage(op.function, x[0], out)
        case ops.GatedActivation():
            return GatedStage(op.function, x[0], x[1], out)
        case ops.Add():
            return AddStage(x[0], x[1], out)
        case ops.SelectRows():
            return SelectStage(x[0], out)
        case _:
            assert_never(op)
