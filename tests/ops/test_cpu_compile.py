"""What the CPU back-end fuses, and what it leaves alone; how activations are laid out."""

from __future__ import annotations

import pytest

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.cpu import memory_use
from kvarn.backends.cpu.compile import compile_program
from kvarn.backends.cpu.memory import _sizes, assign  # the layout's own sizes
from kvarn.backends.cpu.stages import AttentionStage, LinearStage, reads, writes
from kvarn.tensors import DType
from kvarn.testing.models import SETTINGS, tiny_model


def stages_of(family: str, dtype: DType, wanted=()):
    tiny = tiny_model(family, dtype=dtype)
    dtypes = {name: tensor.dtype for name, tensor in tiny.tensors.items()}
    return compile_program(tiny.program, dtypes, wanted)


def names(stages) -> list[str]:
    return [
        stage.label if isinstance(stage, LinearStage) else type(stage).__name__.removesuffix("Stage").lower()
        for stage in stages.stages
    ]


def test_a_quantized_llama_layer_is_five_stages():
    stages = stages_of("llama", DType.Q4_1)
    layer = ["q", "attention", "o", "gate", "down"]
    assert names(stages) == ["embed", *layer, *layer, "select", "lm_head"]
    q, attention, o, gate, down = stages.stages[1:6]
    assert [job.weight for job in q.jobs] == [f"layers.0.attn.{n}.weight" for n in "qkv"]
    assert q.recipe.norm.weight == "layers.0.attn_norm.weight"
    assert attention.quants is o.quants
    assert o.recipe is None
    assert o.jobs[0].residual is not None
    assert gate.jobs[0].up == "layers.0.mlp.up.weight"
    assert gate.jobs[0].quants is down.quants
    assert gate.jobs[0].out is None


def test_float_weights_are_not_fed_int8():
    for stage in stages_of("llama", DType.F16).stages:
        if isinstance(stage, LinearStage):
            assert stage.quants is None
            assert all(job.quants is None for job in stage.jobs)


def test_heads_are_prepared_with_attention():
    (attention, *_) = (s for s in stages_of("qwen3", DType.Q8_0).stages if isinstance(s, AttentionStage))
    assert attention.q.norm.weight.endswith("q_norm.weight")
    assert attention.k.rope is not None


def test_wanted_buffers_are_written_as_floats():
    plain = stages_of("llama", DType.Q4_1)
    for name in ("q", "k", "attn", "gate", "h", "branch"):
        stages = stages_of("llama", DType.Q4_1, (name,))
        assert name in stages.outputs
        assert len(stages.stages) >= len(plain.stages)
    with pytest.raises(KeyError):
        stages_of("llama", DType.Q4_1, ("nonsense",))


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize("wanted", [(), ("h",), ("q", "branch")])
def test_places_that_live_together_never_overlap(family, wanted):
    tiny = tiny_model(family, dtype=DType.Q5_0)
    dtypes = {name: tensor.dtype for name, tensor in tiny.tensors.items()}
    stages = compile_program(tiny.program, dtypes, wanted)
    limits = StepLimits(37, 3, 128)
    layout = assign(stages, tiny.program, limits, 2)
    sizes = _sizes(stages, tiny.program, limits, 2)
    first, last = {}, {}
    for index, stage in enumerate(stages.stages):
        for place in (*reads(stage), *writes(stage)):
            first.setdefault(place, index)
            last[place] = index
    for place in stages.outputs.values():
        last[place] = len(stages.stages)
    for a in first:
        assert layout.offsets[a] % 64 == 0
        assert layout.offsets[a] + sizes[a] <= layout.arena_bytes
        for b in first:
            if a is not b and first[a] <= last[b] and first[b] <= last[a]:
                apart = (
                    layout.offsets[a] + sizes[a] <= layout.offsets[b]
                    or layout.offsets[b] + sizes[b] <= layout.offsets[a]
                )
                assert apart


def test_activations_grow_with_the_step_not_with_the_depth():
    def activations(layers: int, tokens: int) -> int:
        tiny = tiny_model("llama", dtype=DType.Q4_0, num_hidden_layers=layers)
        dtypes = {name: tensor.dtype for name, tensor in tiny.tensors.items()}
        return memory_use(tiny.program, dtypes, KvCacheSpec(4), StepLimits(tokens, 4, 64), 1).activations

    assert activations(2, 64) == activations(6, 64) < activations(2, 256)


@pytest.mark.parametrize("family", SETTINGS)
def test_the_residual_stream_stays_in_one_place(family):
    """Sums are made in place where nothing else needs the old values, and not where something does."""
    stages = stages_of(family, DType.Q4_1).stages
    embed = stages[0]
    sums = [job for s in stages if isinstance(s, LinearStage) for job in s.jobs if job.residual]
    assert all(job.out is job.residual is embed.out for job in sums)
    kept = [job for s in stages_of(family, DType.Q4_1, ("x",)).stages if isinstance(s, LinearStage)
            for job in s.jobs if job.residual]  # fmt: skip
    assert all(job.out is not job.residual for job in kept[-1:])
