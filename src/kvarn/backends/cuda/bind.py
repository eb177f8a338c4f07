"""Launches to calls: each kernel with its weights and places, to be called with a step's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import assert_never

import torch

from kvarn.backends.cuda.cache import KvStore
from kvarn.backends.cuda.frame import Frame
from kvarn.backends.cuda.inputs import StepTensors
from kvarn.backends.cuda.kernels.activation import activation, gated_activation
from kvarn.backends.cuda.kernels.embed import embed, position_embed
from kvarn.backends.cuda.kernels.kv_write import kv_write
from kvarn.backends.cuda.kernels.linear import linear
from kvarn.backends.cuda.kernels.naive import naive_paged_attention
from kvarn.backends.cuda.kernels.norm import norm
from kvarn.backends.cuda.kernels.rope import Rotation, rope, rope_kv_write
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
    NormLaunch,
    PositionLaunch,
    RopeLaunch,
    SelectLaunch,
)
from kvarn.backends.cuda.weights import Weights
from kvarn.program import Program, RopeTable

Call = Callable[[StepTensors], object]


@dataclass(frozen=True, slots=True)
class Parts:
    """What launches work on; all of it is owned by the executable."""

    program: Program
    weights: Weights
    cache: KvStore
    block_size: int
    tables: Mapping[RopeTable, torch.Tensor]
    """float32 (positions, 2, pairs)."""


def bind(launch: Launch, parts: Parts, frame: Frame) -> Call:
    """The call that does what a launch says, on the frame's rows."""
    at, vectors = frame.at, parts.weights.vectors
    match launch:
        case InputLaunch():
            return lambda step: at(launch.out).copy_(step.inputs[launch.name])
        case EmbedLaunch():
            table = vectors[(launch.weight,)]
            return lambda step: embed(step.token_ids, table, launch.scale, at(launch.out))
        case PositionLaunch():
            learned = vectors[(launch.weight,)]
            return lambda step: position_embed(at(launch.x), step.positions, learned, at(launch.out))
        case NormLaunch():
            return _norm(launch, parts, frame)
        case LinearLaunch():
            matrix = parts.weights.matrices[launch.weights]
            bias = vectors[launch.biases] if launch.biases else None
            return lambda _step: linear(at(launch.x), matrix, bias, at(launch.out))
        case RopeLaunch():
            return _rope(launch, parts, frame)
        case AttentionLaunch():
            return _attention(launch, parts, frame)
        case ActivationLaunch():
            return lambda _step: activation(launch.function, at(launch.x), at(launch.out))
        case GatedLaunch():
            return lambda _step: gated_activation(launch.function, at(launch.gate), at(launch.up), at(launch.out))
        case AddLaunch():
            return lambda _step: torch.add(at(launch.a), at(launch.b), out=at(launch.out))
        case SelectLaunch():
            return lambda step: torch.index_select(at(launch.x), 0, step.output_rows, out=at(launch.out))
        case LogitsLaunch():
            return _logits(launch, parts, frame)
        case _:
            assert_never(launch)


def _norm(launch: NormLaunch, parts: Parts, frame: Frame) -> Call:
    weight = parts.weights.vectors[(launch.weight,)]
    bias = None if launch.bias is None else parts.weights.vectors[(launch.bias,)]

    def call(_step: StepTensors) -> None:
        norm(
            frame.at(launch.x), weight, bias, launch.eps, frame.at(launch.out),
            layer=launch.norm == "layer", groups=launch.groups,
            residual=None if launch.residual is None else frame.at(launch.residual),
            summed=None if launch.summed is None else frame.at(launch.summed),
        )  # fmt: skip

    return call


def _rope(launch: RopeLaunch, parts: Parts, frame: Frame) -> Call:
    x, out, at = launch.x, launch.out, frame.at
    rotation = None if launch.table is None else Rotation(parts.tables[launch.table], launch.table.style == "halves")
    if launch.layer is None:
        assert x is not None and out is not None and rotation is not None
        return lambda step: rope(at(x), at(out), launch.head_dim, step.positions, rotation)
    k, v, layer = launch.k, launch.v, parts.program.kv_layers[launch.layer]
    kv, group = parts.cache.layer(launch.layer), parts.program.kv_groups.places[launch.layer][0]
    assert k is not None and v is not None
    if rotation is None:

        def write(step: StepTensors) -> None:
            keys, values = at(k).unflatten(1, (layer.heads, layer.key_dim)), at(v).unflatten(1, (layer.heads, -1))
            kv_write(keys, values, step.slot_mapping[:, group], kv)

        return write
    return lambda step: rope_kv_write(
        None if x is None else at(x), None if out is None else at(out), launch.head_dim, at(k), at(v), kv,
        step.slot_mapping[:, group], step.positions, rotation,
    )  # fmt: skip


def _attention(launch: AttentionLaunch, parts: Parts, frame: Frame) -> Call:
    kv, group = parts.cache.layer(launch.layer), parts.program.kv_groups.places[launch.layer][0]

    def call(step: StepTensors) -> None:
        q = frame.at(launch.q).unflatten(1, (launch.heads, launch.head_dim))
        out = frame.at(launch.out).unflatten(1, (launch.heads, -1))
        # The attention kernels plug in here.
        naive_paged_attention(
            q, kv, step, group, parts.block_size, out,
            scale=launch.scale, window=launch.window, softcap=launch.softcap,
        )  # fmt: skip

    return call


def _logits(launch: LogitsLaunch, parts: Parts, frame: Frame) -> Call:
    matrix = parts.weights.matrices[(launch.weight,)]
    bias = None if launch.bias is None else parts.weights.vectors[(launch.bias,)]

    def call(_step: StepTensors) -> None:
        out = frame.at(launch.out)
        linear(frame.at(launch.x), matrix, None, out)
        if launch.scale != 1.0:
            out.mul_(launch.scale)
        if bias is not None:
            out.add_(bias)
        if launch.softcap is not None:
            out.div_(launch.softcap).tanh_().mul_(launch.softcap)

    return call
