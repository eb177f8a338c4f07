"""What a compiled program consists of: stages over places. Plain records; `build` turns them into a native plan.

A place is an activation's storage with a lifetime, given an offset in the arena by `memory.assign`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvarn.program import RopeTable, Rows


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Storage of float32 rows, of int8 rows with scales, or (`partials`) of attention parts. Compared by identity."""

    rows: Rows
    width: int
    quantized: bool = False


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A norm's parameters, by weight name."""

    weight: str
    bias: str | None
    eps: float
    layer: bool
    groups: int


@dataclass(frozen=True, slots=True)
class InputStage:
    """out is filled by the caller before the step; nothing runs. name: the buffer's."""

    name: str
    out: Place


@dataclass(frozen=True, slots=True)
class EmbedStage:
    """out = scale * table[token_ids]."""

    table: str
    out: Place
    scale: float


@dataclass(frozen=True, slots=True)
class PositionStage:
    """out = x + table[positions]."""

    table: str
    x: Place
    out: Place


@dataclass(frozen=True, slots=True)
class NormStage:
    """out = norm(x)."""

    norm: NormSpec
    x: Place
    out: Place


@dataclass(frozen=True, slots=True)
class RopeStage:
    """out = rotated heads of x."""

    table: RopeTable
    x: Place
    out: Place
    heads: int


@dataclass(frozen=True, slots=True)
class KvWriteStage:
    """Stores k and v."""

    layer: int
    k: Place
    v: Place


@dataclass(frozen=True, slots=True)
class ActivationStage:
    """out = function(x)."""

    function: str
    x: Place
    out: Place


@dataclass(frozen=True, slots=True)
class GatedStage:
    """out = function(gate) * up."""

    function: str
    gate: Place
    up: Place
    out: Place


@dataclass(frozen=True, slots=True)
class AddStage:
    """out = a + b."""

    a: Place
    b: Place
    out: Place


@dataclass(frozen=True, slots=True)
class SelectStage:
    """out = x[output_rows]."""

    x: Place
    out: Place


@dataclass(frozen=True, slots=True)
class Recipe:
    """int8 rows are made of `x`, normed first where `norm` is set."""

    x: Place
    norm: NormSpec | None


@dataclass(frozen=True, slots=True)
class Job:
    """One linear or gate/up pair with what follows: scale, bias, function, residual, softcap; floats or int8 out."""

    weight: str
    bias: str | None = None
    up: str | None = None
    up_bias: str | None = None
    function: str | None = None
    residual: Place | None = None
    scale: float = 1.0
    softcap: float = 0.0
    out: Place | None = None
    quants: Place | None = None


@dataclass(frozen=True, slots=True)
class LinearStage:
    """Linears that read the same rows: floats in `input`, or int8 rows in `quants` (made by `recipe` where set)."""

    label: str
    input: Place | None
    quants: Place | None
    recipe: Recipe | None
    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """Queries or keys: a buffer whose heads are normed and rotated where set."""

    x: Place
    norm: NormSpec | None = None
    rope: RopeTable | None = None


@dataclass(frozen=True, slots=True)
class AttentionStage:
    """Attention of a layer; with `k` and `v` it also prepares heads and stores keys and values."""

    layer: int
    q: HeadSpec
    k: HeadSpec | None
    v: Place | None
    heads: int
    scale: float
    softcap: float
    window: int
    out: Place
    quants: Place | None
    partials: Place


Stage = (
    InputStage | EmbedStage | PositionStage | NormStage | RopeStage | KvWriteStage | ActivationStage | GatedStage
    | AddStage | SelectStage | LinearStage | AttentionStage
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StageList:
    """A compiled program: stages in order, and where its wanted buffers are."""

    stages: tuple[Stage, ...]
    outputs: dict[str, Place]
    inputs: dict[str, Place]


def reads(stage: Stage) -> tuple[Place, ...]:
    """Places a stage reads."""
    match stage:
        case InputStage() | EmbedStage():
            found: tuple[Place | None, ...] = ()
        case PositionStage() | NormStage() | RopeStage() | ActivationStage() | SelectStage():
            found = (stage.x,)
        case KvWriteStage():
            found = (stage.k, stage.v)
        case GatedStage():
            found = (stage.gate, stage.up)
        case AddStage():
            found = (stage.a, stage.b)
        case LinearStage():
            recipe = stage.recipe.x if stage.recipe else None
            found = (stage.input, stage.quants, recipe, *(job.residual for job in stage.jobs))
        case AttentionStage():
            found = (stage.q.x, stage.k.x if stage.k else None, stage.v)
    return tuple(place for place in found if place is not None)


def writes(stage: Stage) -> tuple[Place, ...]:
    """Places a stage writes, its working storage among them."""
    match stage:
        case KvWriteStage():
            found: tuple[Place | None, ...] = ()
        case LinearStage():
            made = stage.quants if stage.recipe else None
            found = (made, *(place for job in stage.jobs for place in (job.out, job.quants)))
        case AttentionStage():
            found = (stage.out, stage.quants, stage.partials)
        case _:
            found = (stage.out,)
    return tuple(place for place in found if place is not None)
