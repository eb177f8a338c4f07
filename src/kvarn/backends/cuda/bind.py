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
from kvarn.backends.cuda.kernels.attention import AttentionWorkspace, attention
from kvarn.backends.cuda.kernels.attention_plan import PROGRAMS, AttentionPlan, workspace_elements
from kvarn.backends.cuda.kernels.embed import embed, position_embed
from kvarn.backends.cuda.kernels.kv_write import kv_write
from kvarn.backends.cuda.kernels.linear import linear
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
    scratch: torch.Tensor
    """uint8, for whatever a kernel needs while it runs."""
    max_model_len: int


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
            return lambda _step: linear(at(launch.x), matrix, bias, at(launch.out), parts.scratch)
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
            kv_write(_heads(at(k), layer.heads), _heads(at(v), layer.heads), step.slot_mapping[:, group], kv)

        return write
    return lambda step: rope_kv_write(
        None if x is None else at(x), None if out is None else at(out), launch.head_dim, at(k), at(v), kv,
        step.slot_mapping[:, group], step.positions, rotation,
    )  # fmt: skip


def _attention(launch: AttentionLaunch, parts: Parts, frame: Frame) -> Call:
    kv, group = parts.cache.layer(launch.layer), parts.program.kv_groups.places[launch.layer][0]
    layer = parts.program.kv_layers[launch.layer]
    floats = parts.scratch[: parts.scratch.numel() // 4 * 4].view(torch.float32)
    programs = PROGRAMS if floats.is_cuda else 1  # Triton's interpreter runs one after the other

    def call(step: StepTensors) -> None:
        sequences = step.seq_lens.shape[0]
        mixed, stats = workspace_elements(sequences, launch.heads, layer.value_dim, parts.max_model_len)
        parents = step.tree_parents
        attention(
            _heads(frame.at(launch.q), launch.heads), kv, step.query_start, step.seq_lens, step.block_tables[:, group],
            AttentionPlan(sequences, step.num_tokens, step.max_query, programs),
            AttentionWorkspace(floats[:mixed], floats[mixed : mixed + stats]),
            block_size=parts.block_size, scale=launch.scale, window=launch.window, softcap=launch.softcap,
            out=_heads(frame.at(launch.out), launch.heads),
            tree=None if parents is None else (parents, step.positions),
        )  # fmt: skip

    return call


def _logits(launch: LogitsLaunch, parts: Parts, frame: Frame) -> Call:
    matrix = parts.weights.matrices[(launch.weight,)]
    bias = None if launch.bias is None else parts.weights.vectors[(launch.bias,)]

    def call(_step: StepTensors) -> None:
        out = frame.at(launch.out)
        linear(frame.at(launch.x), matrix, None, out, parts.scratch)
        if launch.scale != 1.0:
            out.mul_(launch.scale)
        if bias is not None:
            out.add_(bias)
        if launch.softcap is not None:
            out.div_(launch.softcap).tanh_().mul_(launch.softcap)

    return call


def _heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """(rows, heads * dim) as (rows, heads, dim), without a copy."""
    return rows.view(rows.shape[0], heads, rows.shape[1] // heads)
