"""Configs of both formats: what is read from them, and that a wrong or hostile one is refused by field."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.errors import ModelFileError, UnsupportedModelError
from kvarn.kv_types import KV_TYPES
from kvarn.models import program_from_config
from kvarn.program import Activation, Attention, Embed, Logits, Norm, Program, Rope
from kvarn.testing import tiny_gguf
from kvarn.testing.models import SETTINGS

LLAMA_3_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "rope_scaling": None, "tie_word_embeddings": False,
    "bos_token_id": 128000, "eos_token_id": 128001, "attention_bias": False, "hidden_act": "silu",
    "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "pretraining_tp": 1,
}  # fmt: skip
SMALL = {"model_type": "llama", **SETTINGS["llama"]}


def config_of(family, **changes):
    return {"model_type": family, **SETTINGS[family], **changes}


def ops_of(program: Program, kind):
    return [op for op in program.ops if isinstance(op, kind)]


def test_llama_3_8b_has_its_published_size():
    config, program = program_from_config(LLAMA_3_8B, "hf")
    assert 2 * program.num_parameters == 16_060_522_496
    assert program.kv_bytes_per_token(KV_TYPES["float16"]) == 131_072
    assert (config.head_dim, config.num_kv_heads, config.max_positions) == (128, 8, 8192)
    assert (config.bos_token_id, config.eos_token_ids) == (128000, (128001,))


def test_an_empty_gpt2_config_is_the_published_small_model():
    config, program = program_from_config({"model_type": "gpt2"}, "hf")
    assert program.num_parameters == 124_439_808
    assert (config.num_layers, config.num_heads, config.head_dim, config.max_positions) == (12, 12, 64, 1024)
    assert {op.function for op in ops_of(program, Activation)} == {"gelu_tanh"}
    assert {op.scale for op in ops_of(program, Attention)} == {64**-0.5}


def test_a_layer_is_the_ops_that_papers_draw():
    _, program = program_from_config(SMALL, "hf")
    attention = "norm linear linear linear rope rope kv_write attention linear add"
    layer = f"{attention} norm linear linear gated_activation linear add"
    assert " ".join(op.kind for op in program.ops) == f"embed {layer} {layer} select_rows norm logits"


def test_qk_norm_and_post_norms_come_where_the_family_has_them():
    _, qwen3 = program_from_config(config_of("qwen3"), "hf")
    assert "norm linear linear linear norm norm rope rope kv_write" in " ".join(op.kind for op in qwen3.ops)
    _, gemma = program_from_config(config_of("gemma3_text"), "hf")
    kinds = " ".join(op.kind for op in gemma.ops)
    assert "attention linear norm add norm linear linear gated_activation linear norm add" in kinds
    assert ops_of(gemma, Embed)[0].scale == math.sqrt(64)


def test_buffers_do_not_grow_with_layers():
    few, many = (program_from_config({**SMALL, "num_hidden_layers": n}, "hf")[1] for n in (2, 40))
    assert few.buffers == many.buffers


def test_tied_embeddings_are_one_weight():
    tied = program_from_config({**SMALL, "tie_word_embeddings": True}, "hf")[1]
    untied = program_from_config({**SMALL, "tie_word_embeddings": False}, "hf")[1]
    assert untied.num_parameters - tied.num_parameters == SMALL["vocab_size"] * SMALL["hidden_size"]
    assert ops_of(tied, Logits)[0].weight == ops_of(tied, Embed)[0].weight


def windows(program):
    return [op.window for op in ops_of(program, Attention)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (config_of("mistral", sliding_window=None), [None, None]),
        (config_of("mistral"), [24, 24]),
        ({k: v for k, v in config_of("mistral").items() if k != "sliding_window"}, [4096, 4096]),
        (config_of("qwen2", sliding_window=8, max_window_layers=0), [None, None]),
        (config_of("qwen2", sliding_window=8, use_sliding_window=True), [None, None]),
        (config_of("qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=1), [None, 8]),
        (config_of("gemma3_text", num_hidden_layers=7, sliding_window_pattern=6), [24] * 5 + [None] + [24]),
        (config_of("gemma3_text", layer_types=["full_attention", "sliding_attention"]), [None, 24]),
    ],
)
def test_sliding_windows(config, expected):
    program = program_from_config(config, "hf")[1]
    assert windows(program) == expected
    assert [layer.window for layer in program.kv_layers] == expected


def test_gemma3_gguf_has_a_global_layer_in_six_unless_it_says_otherwise():
    read = lambda **changes: windows(program_from_config(tiny_gguf("gemma3", **changes).metadata, "gguf")[1])  # noqa: E731
    assert read(block_count=7) == [24] * 5 + [None] + [24]
    assert read(block_count=4, attention__sliding_window_pattern=2) == [24, None, 24, None]
    assert read(block_count=3, attention__sliding_window_pattern=[False, True, True]) == [None, 24, 24]


def test_the_largest_gemma3_scales_queries_by_its_width():
    for layers, scale in ((61, 32**-0.5), (62, 16**-0.5)):
        program = program_from_config(tiny_gguf("gemma3", block_count=layers).metadata, "gguf")[1]
        assert {op.scale for op in ops_of(program, Attention)} == {scale}


def test_yarn_stretches_the_longest_sequence():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = config_of("qwen2", max_position_embeddings=32768, rope_scaling=yarn)
    assert program_from_config(config, "hf")[0].max_positions == 131072
    stretched = {**config, "max_position_embeddings": 131072}
    assert program_from_config(stretched, "hf")[0].max_positions == 131072
    names = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 512}
    assert program_from_config(tiny_gguf("qwen2", **names).metadata, "gguf")[1].max_positions == 2048


def frequencies(config, **options):
    """All rotary tables' frequencies, layer by layer (queries only)."""
    ropes = ops_of(program_from_config(config, "hf", **options)[1], Rope)
    return [np.array(op.table.inv_freq) for op in ropes[::2]]


def test_the_original_length_beside_the_rope_section_wins():
    """As Phi-3's configs have it: longrope's long factors are for more than that many tokens."""
    factors = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = config_of("llama", rope_scaling={**factors, "original_max_position_embeddings": 512})
    plain = frequencies(config)[0]
    np.testing.assert_allclose(frequencies({**config, "original_max_position_embeddings": 128})[0], plain / 2)
    below = frequencies({**config, "original_max_position_embeddings": 128}, max_model_len=128)[0]
    np.testing.assert_array_equal(below, plain)


def test_gemma3s_old_rope_scaling_is_of_global_layers_and_adds_to_the_new():
    config = config_of("gemma3_text", rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 100.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    })  # fmt: skip
    local, everywhere = frequencies(config)
    scaled_local, scaled = frequencies({**config, "rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    np.testing.assert_array_equal(scaled_local, local)
    np.testing.assert_allclose(scaled, everywhere / 8)
    assert local[1] == pytest.approx(50.0 ** (-2 / 32)) and everywhere[1] == pytest.approx(100.0 ** (-2 / 32))


def test_rotation_styles_of_the_formats():
    styles = {
        (form, name): ops_of(program_from_config(metadata, form)[1], Rope)[0].table.style
        for form, name, metadata in (
            ("hf", "llama", SMALL),
            ("gguf", "llama", tiny_gguf("llama").metadata),
            ("gguf", "qwen2", tiny_gguf("qwen2").metadata),
            ("gguf", "gemma3", tiny_gguf("gemma3").metadata),
        )
    }
    assert {key for key, style in styles.items() if style == "interleaved"} == {("gguf", "llama")}


def test_end_tokens_of_a_gguf_are_all_it_names():
    ends = {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 5}
    config, _ = program_from_config(tiny_gguf("llama", metadata=ends).metadata, "gguf")
    assert config.eos_token_ids == (5, 7)


def test_partial_rotation_of_a_gguf_llama():
    program = program_from_config(tiny_gguf("llama", rope__dimension_count=8).metadata, "gguf")[1]
    assert ops_of(program, Rope)[0].table.rotary_dim == 8


def test_norms_keep_the_epsilon_of_the_file():
    for epsilon in (1e-5, 1e-6):
        program = program_from_config({**SMALL, "rms_norm_eps": epsilon}, "hf")[1]
        assert {op.eps for op in ops_of(program, Norm)} == {epsilon}


WRONG = [
    ({"vocab_size": -1}, "vocab_size"),
    ({"vocab_size": 10**9}, "vocab_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": 64.0}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_attention_heads": 3}, "num_key_value_heads"),
    ({"num_attention_heads": 3, "num_key_value_heads": 3}, "hidden_size"),
    ({"head_dim": 7}, "head_dim"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
    ({"max_position_embeddings": [4]}, "max_position_embeddings"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
    ({"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4}}, "high_freq_factor"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [0.0] * 8, "long_factor": [1.0] * 8}}, "short_factor"),
    ({"rope_scaling": {"type": 3}}, "rope_type"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
    ({"eos_token_id": [-1]}, "eos_token_id"),
    ({"hidden_act": 4}, "hidden_act"),
    ({"model_type": None}, "model_type"),
]
UNSUPPORTED = [
    ({"model_type": "mixtral"}, "model_type 'mixtral'"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ({"num_local_experts": 8}, "num_local_experts"),
    ({"hidden_act": "quick_gelu"}, "hidden_act: 'quick_gelu'"),
    ({"rope_scaling": {"type": "ntk-by-hand", "factor": 2.0}}, "rope_type: 'ntk-by-hand'"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, "mrope_section"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
]


@pytest.mark.parametrize(("changes", "field"), WRONG)
def test_a_wrong_value_is_refused_by_field(changes, field):
    with pytest.raises(ModelFileError, match=re.escape(field)) as caught:
        program_from_config({**SMALL, **changes}, "hf", path="some/config.json")
    assert caught.value.field.endswith(field)
    assert str(caught.value).startswith("some/config.json")


@pytest.mark.parametrize(("changes", "words"), UNSUPPORTED)
def test_what_kvarn_does_not_run_is_refused_by_name(changes, words):
    with pytest.raises(UnsupportedModelError, match=re.escape(words)):
        program_from_config({**SMALL, **changes}, "hf")


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("llama", {"expert_count": 8}, "llama.expert_count"),
        ("llama", {"rope__scaling__type": "longrope"}, "rope.scaling.type: 'longrope'"),
        ("qwen3", {"attention__value_length": 16}, "attention.value_length"),
        ("qwen2", {"rope__scaling__type": "yarn", "rope__scaling__yarn_ext_factor": 0.5}, "yarn_ext_factor"),
    ],
)
def test_gguf_features_that_kvarn_does_not_run(architecture, changes, words):
    metadata = {**tiny_gguf(architecture).metadata}
    metadata.update({f"{architecture}.{key.replace('__', '.')}": value for key, value in changes.items()})
    with pytest.raises(UnsupportedModelError, match=re.escape(words)):
        program_from_config(metadata, "gguf")


@pytest.mark.parametrize("field", ["use_bidirectional_attention", "attn_logit_softcapping"])
def test_gemma3_features_that_kvarn_does_not_run(field):
    with pytest.raises(UnsupportedModelError, match=field):
        program_from_config(config_of("gemma3_text", **{field: 1.0 if "soft" in field else True}), "hf")


def test_gemma3_rope_parameters_must_be_by_kind_of_layer():
    with pytest.raises(ModelFileError, match="full_attention and sliding_attention"):
        program_from_config(config_of("gemma3_text", rope_parameters={"rope_type": "linear", "factor": 8.0}), "hf")


def test_an_absurd_value_does_not_fill_the_message():
    with pytest.raises(ModelFileError) as caught:
        program_from_config({**SMALL, "hidden_size": "9" * 100_000}, "hf")
    assert len(str(caught.value)) < 300


HOSTILE = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.just([]), st.just({}),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3)), max_size=9),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta", "short_factor", "long_factor", "beta_fast",
                         "original_max_position_embeddings", "full_attention", "sliding_attention", "mscale"]),
        st.one_of(st.sampled_from(["linear", "llama3", "yarn", "longrope", "dynamic"]), st.floats(), st.integers()),
    ),
)  # fmt: skip
HF_FIELDS = sorted({
    *SETTINGS["llama"], *SETTINGS["gpt2"], "model_type", "head_dim", "rope_theta", "rope_scaling", "rope_parameters",
    "rms_norm_eps", "sliding_window", "layer_types", "sliding_window_pattern", "use_sliding_window", "text_config",
    "max_window_layers", "query_pre_attn_scalar", "final_logit_softcapping", "tie_word_embeddings", "hidden_act",
    "attention_bias", "mlp_bias", "n_inner", "layer_norm_epsilon", "activation_function", "rope_local_base_freq",
    "original_max_position_embeddings", "partial_rotary_factor", "quantization_config", "hidden_activation",
})  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(SETTINGS)), st.dictionaries(st.sampled_from(HF_FIELDS), HOSTILE, max_size=3))
def test_any_config_gives_a_program_or_a_named_error(family, changes):
    try:
        _, program = program_from_config(config_of(family, **changes), "hf", max_model_len=64)
    except (ModelFileError, UnsupportedModelError) as error:
        assert any(field in str(error) for field in HF_FIELDS) or "factor" in str(error)  # noqa: PT017
    else:
        frequencies = [f for op in ops_of(program, Rope) for f in op.table.inv_freq]
        assert all(math.isfinite(f) and f > 0 for f in frequencies)


GGUF_FIELDS = [
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count", "vocab_size",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.dimension_count", "expert_count",
    "rope.scale_linear", "rope.scaling.yarn_beta_fast", "rope.scaling.attn_factor", "final_logit_softcapping",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["llama", "qwen2", "qwen3", "gemma3", "gpt2"]),
    st.dictionaries(st.sampled_from(GGUF_FIELDS), st.one_of(HOSTILE, st.sampled_from(["linear", "yarn"])), max_size=3),
)
def test_any_gguf_metadata_give_a_program_or_a_named_error(architecture, changes):
    metadata = {**GGUFS[architecture], **{f"{architecture}.{key}": value for key, value in changes.items()}}
    try:
        _, program = program_from_config(metadata, "gguf")
    except (ModelFileError, UnsupportedModelError) as error:
        assert f"{architecture}." in str(error)  # noqa: PT017
    else:
        frequencies = [f for op in ops_of(program, Rope) for f in op.table.inv_freq]
        assert all(math.isfinite(f) and f > 0 for f in frequencies)


GGUFS = {name: tiny_gguf(name).metadata for name in ("llama", "qwen2", "qwen3", "gemma3", "gpt2")}
