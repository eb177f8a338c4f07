"""What a step must move and multiply at least on this back-end: by op of the program, and by stage of the native plan.

Both views add up to the same. Bytes of weights are those that kernels hold, counted once a step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from kvarn import _native
from kvarn.backends.cpu.compile import compile_program
from kvarn.backends.cpu.memory import held_bytes
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
    reads,
    writes,
)
from kvarn.kv_types import KvType
from kvarn.program import Program, Rows, ops
from kvarn.program.counts import StepShape, count_op
from kvarn.tensors import DType

LAYER = re.compile(r"layers\.(\d+)\.")
_WITHIN = (RopeStage, ActivationStage, GatedStage, AddStage)
"""Stages without weights: they belong to the layer of the one before them."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes that must come from memory or go there, and multiply-adds. Costs add up."""

    weight_bytes: int = 0
    kv_bytes: int = 0
    """Read and written."""
    integer_macs: int = 0
    """Of quantized weights with int8 activations."""
    float_macs: int = 0
    """Of float weights, and of attention."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes + other.kv_bytes,
            self.integer_macs + other.integer_macs,
            self.float_macs + other.float_macs,
        )

    @property
    def bytes(self) -> int:
        """All bytes."""
        return self.weight_bytes + self.kv_bytes

    @property
    def macs(self) -> int:
        """All multiply-adds."""
        return self.integer_macs + self.float_macs


@dataclass(frozen=True, slots=True)
class StageCost:
    """The cost of one native stage in one step."""

    label: str
    """As the native plan has it."""
    name: str
    """What it does: the linears in it, or the kind of op."""
    layer: int | None
    """None: before or after the layers."""
    cost: Cost
    activation_bytes: int
    """Rows read and written; they seldom leave the caches."""
    runs: bool
    """False where a step of this shape has nothing to do in it: the stage after it takes its work."""


def op_cost(program: Program, op: ops.Op, shape: StepShape, dtypes: Mapping[str, DType], kv: KvType) -> Cost:
    """The cost of one op in a step. dtypes: stored type of each weight. kv: of keys and values."""
    counts = count_op(program, op, shape, lambda name: held_bytes(program.weight(name), dtypes[name]), kv)
    macs = counts.flops // 2 if isinstance(op, ops.Linear | ops.Logits | ops.Attention) else 0
    integer = isinstance(op, ops.Linear | ops.Logits) and dtypes[op.weight].quantized
    return Cost(
        weight_bytes=counts.weight_bytes,
        kv_bytes=counts.kv_read_bytes + counts.kv_write_bytes,
        integer_macs=macs if integer else 0,
        float_macs=0 if integer else macs,
    )


def step_cost(program: Program, shape: StepShape, dtypes: Mapping[str, DType], kv: KvType) -> Cost:
    """The cost of a step: of all its ops."""
    return sum((op_cost(program, op, shape, dtypes, kv) for op in program.ops), Cost())


def stage_costs(
    program: Program, shape: StepShape, dtypes: Mapping[str, DType], kv: KvType
) -> tuple[StageCost, ...]:
    """The cost of each stage of the native plan that `CpuExecutable` runs, in its order."""
    counter = _Counter(program, shape, dtypes, kv)
    stages = compile_program(program, dtypes)
    logits = stages.outputs[program.output]
    costs: list[StageCost] = []
    for stage in stages.stages:
        made = counter.native(stage, logits)
        if isinstance(stage, _WITHIN) and costs:
            made = [replace(cost, layer=costs[-1].layer) for cost in made]
        costs += made
    return tuple(costs)


class _Counter:
    def __init__(self, program: Program, shape: StepShape, dtypes: Mapping[str, DType], kv: KvType) -> None:
        self.program = program
        self.shape = shape
        self.dtypes = dtypes
        self.kv = kv
        self.decode = all(count == 1 for count, _ in shape.sequences)

    def native(self, stage: Stage, logits: Place) -> list[StageCost]:
        """The native stages that one compiled stage becomes: one, or its input's preparation and itself."""
        match stage:
            case LinearStage():
                return self._linear(stage, logits)
            case AttentionStage():
                return self._attention(stage)
            case InputStage():
                return []
            case _:
                cost, name, layer = self._plain(stage)
                made = writes(stage)
                runs = all(self._rows(place) > 0 for place in made)
                return [StageCost(name, name, layer, cost, self._activations((*reads(stage), *made)), runs)]

    def _plain(self, stage: Stage) -> tuple[Cost, str, int | None]:
        match stage:
            case EmbedStage() | PositionStage():
                name = "embed" if isinstance(stage, EmbedStage) else "position_embed"
                row = self._weight(stage.table) // self.program.weight(stage.table).shape[0]
                return Cost(weight_bytes=row * self.shape.tokens), name, None
            case NormStage():
                return self._norm(stage.norm, stage.out), "norm", _layer(stage.norm.weight)
            case KvWriteStage():
                return self._kv_written(stage.layer), "kv_write", stage.layer
            case RopeStage():
                return Cost(), "rope", None
            case ActivationStage():
                return Cost(), "activation", None
            case GatedStage():
                return Cost(), "gated_activation", None
            case AddStage():
                return Cost(), "add", None
            case SelectStage():
                return Cost(), "select_rows", None
            case LinearStage() | AttentionStage() | InputStage():
                raise AssertionError("these become no stage, or several")

    # Linears

    def _linear(self, stage: LinearStage, logits: Place) -> list[StageCost]:
        cost = sum((self._job(job, stage) for job in stage.jobs), Cost())
        name = "logits" if any(job.out is logits for job in stage.jobs) else "+".join(_names(stage.jobs))
        layer = _layer(stage.jobs[0].weight)
        outs = tuple(place for job in stage.jobs for place in (job.out, job.quants, job.residual) if place is not None)
        if stage.recipe is None:
            inputs = tuple(place for place in (stage.input, stage.quants) if place is not None)
            runs = all(self._rows(place) > 0 for place in inputs)
            return [StageCost(stage.label, name, layer, cost, self._activations((*inputs, *outs)), runs)]
        assert stage.quants is not None
        prepared = self._rows(stage.quants) > _native.OWN_ROWS
        preparation = self._recipe(stage.recipe)
        between = (stage.quants,) if prepared else (stage.recipe.x,)
        moved = self._activations((stage.recipe.x, stage.quants)) if prepared else 0
        return [
            StageCost("prepare", "prepare", layer, preparation if prepared else Cost(), moved, prepared),
            StageCost(
                stage.label, name, layer, cost if prepared else preparation + cost,
                self._activations((*between, *outs)), self._rows(stage.quants) > 0,
            ),
        ]  # fmt: skip

    def _job(self, job: Job, stage: LinearStage) -> Cost:
        source = stage.input or stage.quants
        assert source is not None
        if self._rows(source) == 0:
            return Cost()
        total = Cost()
        for weight, bias in ((job.weight, job.bias), (job.up, job.up_bias)):
            if weight is None:
                continue
            macs = self._rows(source) * self.program.weight(weight).num_elements
            integer = self.dtypes[weight].quantized
            held = self._weight(weight) + (0 if bias is None else self._weight(bias))
            total += Cost(held, 0, macs if integer else 0, 0 if integer else macs)
        return total

    def _recipe(self, recipe: Recipe) -> Cost:
        return Cost() if recipe.norm is None else self._norm(recipe.norm, recipe.x)

    # Attention

    def _attention(self, stage: AttentionStage) -> list[StageCost]:
        layer = self.program.kv_layers[stage.layer]
        window = stage.window or None
        pairs = self.shape.attended(window) * stage.heads
        cost = Cost(
            kv_bytes=self.shape.context(window) * layer.bytes_per_token(self.kv),
            float_macs=pairs * (layer.key_dim + layer.value_dim),
        )
        outs = tuple(place for place in (stage.out, stage.quants) if place is not None)
        if stage.k is None or stage.v is None:
            moved = self._activations((stage.q.x, *outs))
            return [StageCost("attention", "attention", stage.layer, cost, moved, True)]
        heads = self._head(stage.q) + self._head(stage.k) + self._kv_written(stage.layer)
        inputs = (stage.q.x, stage.k.x, stage.v)
        if self.decode:
            moved = self._activations((*inputs, *outs))
            return [
                StageCost("heads", "heads", stage.layer, Cost(), 0, False),
                StageCost("attention", "attention", stage.layer, heads + cost, moved, True),
            ]
        return [
            StageCost("heads", "heads", stage.layer, heads, self._activations((*inputs, stage.q.x)), True),
            StageCost("attention", "attention", stage.layer, cost, self._activations((stage.q.x, *outs)), True),
        ]

    def _head(self, spec: HeadSpec) -> Cost:
        return Cost() if spec.norm is None else self._norm(spec.norm, spec.x)

    def _kv_written(self, layer: int) -> Cost:
        return Cost(kv_bytes=self.shape.tokens * self.program.kv_layers[layer].bytes_per_token(self.kv))

    # Parts

    def _norm(self, norm: NormSpec, rows: Place) -> Cost:
        if self._rows(rows) == 0:
            return Cost()
        bias = 0 if norm.bias is None else self._weight(norm.bias)
        return Cost(weight_bytes=self._weight(norm.weight) + bias)

    def _weight(self, name: str) -> int:
        return held_bytes(self.program.weight(name), self.dtypes[name])

    def _rows(self, place: Place) -> int:
        return self.shape.tokens if place.rows is Rows.TOKENS else self.shape.outputs

    def _activations(self, places: Iterable[Place]) -> int:
        total = 0
        for place in places:
            rows = self._rows(place)
            total += _native.quant_bytes(rows, place.width) if place.quantized else 4 * place.width * rows
        return total


def _names(jobs: Iterable[Job]) -> list[str]:
    """The last part of each weight's name: "q" of "layers.0.attn.q.weight"."""
    weights = (name for job in jobs for name in (job.weight, job.up) if name is not None)
    return [name.removesuffix(".weight").rpartition(".")[2] for name in weights]


def _layer(weight: str) -> int | None:
    found = LAYER.match(weight)
    return None if found is None else int(found[1])
