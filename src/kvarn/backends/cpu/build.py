"""Stages to a native step plan: places become buffers, weight names become packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn import _native
from kvarn.backends.base import StepLimits
from kvarn.backends.cpu import stages as s
from kvarn.backends.cpu.memory import Layout
from kvarn.program import KvGroups, Program, RopeTable, Rows

ROTARY_CHUNK = 1024
"""Positions whose angles are in memory at once: of all positions they would take more than the table."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What plans of one executable share. Owned by the executable."""

    matrices: Mapping[str, _native.PackedWeight]
    vectors: Mapping[str, _native.Vector]
    rotary: Mapping[RopeTable, _native.RotaryTable]


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """A native plan and where its outputs are."""

    plan: _native.StepPlan
    outputs: Mapping[str, tuple[_native.FloatBuffer, Rows]]
    inputs: Mapping[str, _native.FloatBuffer]


def rotary_table(table: RopeTable, positions: int) -> _native.RotaryTable:
    """cos and sin of positions 0 … positions-1, computed in float64, rounded once."""
    values: NDArray[np.float32] = np.empty((positions, 2, len(table.inv_freq)), dtype=np.float32)
    frequencies = np.asarray(table.inv_freq, dtype=np.float64)
    for start in range(0, positions, ROTARY_CHUNK):
        end = min(start + ROTARY_CHUNK, positions)
        angles = np.arange(start, end, dtype=np.float64)[:, None] * frequencies[None, :]
        values[start:end, 0] = np.cos(angles) * table.attention_factor
        values[start:end, 1] = np.sin(angles) * table.attention_factor
    return _native.RotaryTable(values, table.style == "interleaved")


def build_plan(
    stages: s.StageList,
    layout: Layout,
    parameters: Parameters,
    *,
    program: Program,
    limits: StepLimits,
    pool: _native.Pool,
    kv: _native.KvCache,
    isa: str,
) -> BuiltPlan:
    """The native plan of compiled stages. Allocates its activations."""
    plan = _native.StepPlan(
        pool, kv, isa, limits.max_num_tokens, limits.max_num_sequences, limits.max_num_outputs, limits.max_model_len,
        program.vocab_size, layout.arena_bytes, [window or 0 for window in program.kv_groups.windows],
    )  # fmt: skip
    builder = _Builder(plan, layout, parameters, program.kv_groups)
    for stage in stages.stages:
        builder.add(stage)
    plan.finish()
    outputs = {name: (builder.floats(place), place.rows) for name, place in stages.outputs.items()}
    return BuiltPlan(plan, outputs, {name: builder.floats(place) for name, place in stages.inputs.items()})


class _Builder:
    def __init__(self, plan: _native.StepPlan, layout: Layout, parameters: Parameters, groups: KvGroups) -> None:
        self.plan = plan
        self.layout = layout
        self.parameters = parameters
        self.groups = groups

    def floats(self, place: s.Place | None) -> _native.FloatBuffer:
        if place is None:
            return _native.FloatBuffer()
        offset = self.layout.offsets[place]
        return self.plan.float_buffer(offset, place.width, place.width, place.rows is Rows.OUTPUTS)

    def quants(self, place: s.Place | None) -> _native.QuantBuffer:
        if place is None:
            return _native.QuantBuffer()
        return self.plan.quant_buffer(self.layout.offsets[place], place.width, place.rows is Rows.OUTPUTS)

    def _norm(self, norm: s.NormSpec | None) -> _native.Norm:
        if norm is None:
            return _native.Norm()
        vectors = self.parameters.vectors
        bias = None if norm.bias is None else vectors[norm.bias]
        return _native.Norm(vectors[norm.weight], bias, norm.eps, norm.layer, norm.groups)

    def _rope(self, table: RopeTable | None) -> _native.RotaryTable | None:
        return None if table is None else self.parameters.rotary[table]

    def _heads(self, spec: s.HeadSpec | None) -> _native.HeadRecipe:
        if spec is None:
            return _native.HeadRecipe(_native.FloatBuffer(), _native.Norm(), None)
        return _native.HeadRecipe(self.floats(spec.x), self._norm(spec.norm), self._rope(spec.rope))

    def _job(self, job: s.Job) -> _native.LinearJob:
        matrices, vectors = self.parameters.matrices, self.parameters.vectors
        return _native.LinearJob(
            weight=matrices[job.weight],
            up=None if job.up is None else matrices[job.up],
            bias=None if job.bias is None else vectors[job.bias],
            up_bias=None if job.up_bias is None else vectors[job.up_bias],
            function=job.function,
            residual=self.floats(job.residual),
            scale=job.scale,
            softcap=job.softcap,
            out=self.floats(job.out),
            quants=self.quants(job.quants),
        )

    def add(self, stage: s.Stage) -> None:
        """Appends one stage to the plan."""
        plan, matrices = self.plan, self.parameters.matrices
        match stage:
            case s.InputStage():
                pass
            case s.EmbedStage():
                plan.embed(matrices[stage.table], self.floats(stage.out), stage.scale)
            case s.PositionStage():
                plan.position_embed(matrices[stage.table], self.floats(stage.x), self.floats(stage.out))
            case s.NormStage():
                plan.norm(self._norm(stage.norm), self.floats(stage.x), self.floats(stage.out))
            case s.RopeStage():
                table = self.parameters.rotary[stage.table]
                plan.rope(table, self.floats(stage.x), self.floats(stage.out), stage.heads)
            case s.KvWriteStage():
                group, slot = self.groups.places[stage.layer]
                plan.kv_write(group, slot, self.floats(stage.k), self.floats(stage.v))
            case s.ActivationStage():
                plan.activation(stage.function, self.floats(stage.x), self.floats(stage.out))
            case s.GatedStage():
                plan.gated_activation(
                    stage.function, self.floats(stage.gate), self.floats(stage.up), self.floats(stage.out)
                )
            case s.AddStage():
                plan.add(self.floats(stage.a), self.floats(stage.b), self.floats(stage.out))
            case s.SelectStage():
                plan.select_rows(self.floats(stage.x), self.floats(stage.out))
            case s.LinearStage():
                recipe = None
                if stage.recipe is not None:
                    recipe = _native.InputRecipe(self.floats(stage.recipe.x), self._norm(stage.recipe.norm))
                jobs = [self._job(job) for job in stage.jobs]
                plan.linear(stage.label, self.floats(stage.input), self.quants(stage.quants), recipe, jobs)
            case s.AttentionStage():
                group, slot = self.groups.places[stage.layer]
                plan.attention(
                    group, slot, self._heads(stage.q), self._heads(stage.k), self.floats(stage.v), stage.k is not None,
                    stage.heads, stage.scale, stage.softcap, stage.window, self.floats(stage.out),
                    self.quants(stage.quants), self.layout.offsets[stage.partials],
                )  # fmt: skip
