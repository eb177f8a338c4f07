"""What a program becomes on the card: launches over views of places. Plain records; nothing here needs torch.

A place is storage for the rows of one or several values; a view is a span of its columns. Linears that read the same
rows are one matrix, whose result is one place with a view for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from kvarn.program import RopeTable, Rows

Function = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Storage of (rows, width) elements, of the executable's type, or float32. Compared by identity."""

    rows: Rows
    width: int
    float32: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """`width` columns of a place from column `start` on."""

    place: Place
    start: int
    width: int


@dataclass(frozen=True, slots=True)
class InputLaunch:
    """out = what the caller gives under `name`."""

    out: View
    name: str


@dataclass(frozen=True, slots=True)
class EmbedLaunch:
    """See `ops.Embed`."""

    out: View
    weight: str
    scale: float


@dataclass(frozen=True, slots=True)
class PositionLaunch:
    """See `ops.PositionEmbed`."""

    out: View
    x: View
    weight: str


@dataclass(frozen=True, slots=True)
class NormLaunch:
    """summed = x + residual, out = norm(summed); without a residual out = norm(x). See `ops.Norm`."""

    out: View
    x: View
    residual: View | None
    summed: View | None
    weight: str
    bias: str | None
    eps: float
    norm: Literal["rms", "layer"]
    groups: int


@dataclass(frozen=True, slots=True)
class LinearLaunch:
    """out = x times the matrix of all the weights, one below the other. biases: as many, or none."""

    out: View
    x: View
    weights: tuple[str, ...]
    biases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RopeLaunch:
    """Rotates heads of x; and, where there is a `layer`, keys, which it writes with their values to the cache.

    x and out None: keys alone. table None: nothing is rotated. rotate_keys: k is still to be rotated. head_dim: of x.
    """

    out: View | None
    x: View | None
    heads: int
    head_dim: int
    table: RopeTable | None
    layer: int | None = None
    k: View | None = None
    v: View | None = None
    rotate_keys: bool = False


@dataclass(frozen=True, slots=True)
class AttentionLaunch:
    """See `ops.Attention`."""

    out: View
    q: View
    layer: int
    heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True, slots=True)
class ActivationLaunch:
    """out = f(x)."""

    out: View
    x: View
    function: Function


@dataclass(frozen=True, slots=True)
class GatedLaunch:
    """out = f(gate) * up."""

    out: View
    gate: View
    up: View
    function: Function


@dataclass(frozen=True, slots=True)
class AddLaunch:
    """out = a + b."""

    out: View
    a: View
    b: View


@dataclass(frozen=True, slots=True)
class SelectLaunch:
    """See `ops.SelectRows`."""

    out: View
    x: View


@dataclass(frozen=True, slots=True)
class LogitsLaunch:
    """See `ops.Logits`; out is float32."""

    out: View
    x: View
    weight: str
    bias: str | None
    scale: float
    softcap: float | None


Launch = (
    InputLaunch
    | EmbedLaunch
    | PositionLaunch
    | NormLaunch
    | LinearLaunch
    | RopeLaunch
    | AttentionLaunch
    | ActivationLaunch
    | GatedLaunch
    | AddLaunch
    | SelectLaunch
    | LogitsLaunch
)


def places(launch: Launch) -> Iterator[Place]:
    """The places that a launch reads or writes."""
    for field in fields(launch):
        value = getattr(launch, field.name)
        if isinstance(value, View):
            yield value.place


@dataclass(frozen=True, slots=True)
class Lowered:
    """A program's launches in order, and where its outputs are after them."""

    launches: tuple[Launch, ...]
    outputs: dict[str, View]

    @property
    def matrices(self) -> tuple[tuple[str, ...], ...]:
        """The weights of linears as launches want them: names whose matrices are one."""
        found: dict[tuple[str, ...], None] = {}
        for launch in self.launches:
            if isinstance(launch, LinearLaunch):
                found[launch.weights] = None
            elif isinstance(launch, LogitsLaunch):
                found[(launch.weight,)] = None
        return tuple(found)

    @property
    def biases(self) -> tuple[tuple[str, ...], ...]:
        """What is added to their results, likewise."""
        found: dict[tuple[str, ...], None] = {}
        for launch in self.launches:
            if isinstance(launch, LinearLaunch) and launch.biases:
                found[launch.biases] = None
            elif isinstance(launch, LogitsLaunch) and launch.bias is not None:
                found[(launch.bias,)] = None
        return tuple(found)

    @property
    def others(self) -> dict[str, bool]:
        """Weights that stand alone: tables and what norms read; for each whether it is a norm's, which is float32."""
        found: dict[str, bool] = {}
        for launch in self.launches:
            if isinstance(launch, EmbedLaunch | PositionLaunch):
                found[launch.weight] = False
            elif isinstance(launch, NormLaunch):
                found.update({name: True for name in (launch.weight, launch.bias) if name is not None})
        return found
