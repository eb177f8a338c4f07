"""Gemma 3 (Gemma Team 2025), text only: local and global layers, norms around each block, QK-norm."""

from __future__ import annotations

import math
from dataclasses import replace

from kvarn.errors import UnsupportedModelError
from kvarn.models import decoder, rope
from kvarn.models.blocks import AttentionSpec
from kvarn.models.config import ConfigReader
from kvarn.models.decoder import Blueprint
from kvarn.models.family import Family, LoadOptions
from kvarn.models.source import NameMap, TensorRef

LOCAL_THETA = 10000.0
PATTERN = 6
"""Every sixth layer is global."""
LARGEST_LAYERS = 62
"""The 27B model, whose queries are scaled by hidden_size / num_heads instead of head_dim (GGUF does not say so)."""

HF_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}
"""What transformers assumes where a config.json is silent."""
NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
}
HF_NAMES: NameMap = {
    **decoder.HF_NAMES,
    **{f"layers.{{i}}.{o}.weight": TensorRef(f"layers.{{i}}.{t}.weight", plus_one=True) for o, t in NORMS.items()},
    "norm.weight": TensorRef("norm.weight", plus_one=True),
}
GGUF_NAMES: NameMap = {
    **decoder.GGUF_NAMES,
    "layers.{i}.attn_post_norm.weight": TensorRef("blk.{i}.post_attention_norm.weight"),
    "layers.{i}.mlp_post_norm.weight": TensorRef("blk.{i}.post_ffw_norm.weight"),
}


def from_hf(reader: ConfigReader, options: LoadOptions) -> Blueprint:
    """Reads a config.json of model_type gemma3_text, or the text_config of gemma3."""
    text = reader.section("text_config")
    if text is not None:
        text.tensor_names = reader.tensor_names
        reader = text
    if reader.boolean("use_bidirectional_attention", False):
        raise UnsupportedModelError(f"{reader.path}: use_bidirectional_attention is not supported")
    if reader.get("attn_logit_softcapping") is not None:
        raise UnsupportedModelError(f"{reader.path}: attn_logit_softcapping: Gemma 3 has none (nor has its oracle)")
    values = {**HF_DEFAULTS, **{key: value for key, value in reader.values.items() if value is not None}}
    reader = ConfigReader(values, path=reader.path, tensor_names=reader.tensor_names)
    config = decoder.config_from_hf(reader, "gemma3", tie_default=True)
    ropes = reader.section("rope_parameters")
    if ropes is not None:
        local_scaling, global_scaling = ropes.section("sliding_attention"), ropes.section("full_attention")
    else:
        local_scaling, global_scaling = None, reader.section("rope_scaling")
    local_rope, global_rope = (
        rope.table_from_hf(reader, config.head_dim, theta=theta, scaling=scaling, max_positions=config.max_positions,
                           max_model_len=options.max_model_len)
        for theta, scaling in (
            (reader.number("rope_local_base_freq", LOCAL_THETA), local_scaling),
            (reader.number("rope_theta", 1e6), global_scaling),
        )
    )  # fmt: skip
    spec = AttentionSpec(
        config.num_heads, config.num_kv_heads, config.head_dim,
        reader.number("query_pre_attn_scalar", 256.0) ** -0.5,
        qkv_bias=reader.boolean("attention_bias", False), out_bias=reader.boolean("attention_bias", False),
        qk_norm_eps=config.norm_eps,
    )  # fmt: skip
    local = replace(spec, rope=local_rope, window=reader.integer("sliding_window", 4096, high=1 << 31))
    pattern = reader.integer("sliding_window_pattern", PATTERN, high=1 << 16)
    kinds = decoder.layer_types(reader, config.num_layers) or tuple(
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(config.num_layers)
    )
    return Blueprint(
        config,
        tuple(local if kind == "sliding_attention" else replace(spec, rope=global_rope) for kind in kinds),
        activation=decoder.activation_of(reader, "hidden_activation", "gelu_pytorch_tanh"),
        embed_scale=math.sqrt(config.hidden_size),
        post_norms=True,
        logit_softcap=reader.optional_number("final_logit_softcapping"),
    )


def from_gguf(reader: ConfigReader, options: LoadOptions) -> Blueprint:
    """Reads GGUF metadata of architecture gemma3; its norms have the 1 added already."""
    config = decoder.config_from_gguf(reader, "gemma3")
    large = config.num_layers == LARGEST_LAYERS
    spec = AttentionSpec(
        config.num_heads, config.num_kv_heads, config.head_dim,
        (config.hidden_size / config.num_heads if large else config.head_dim) ** -0.5,
        rope.table_from_gguf(reader, config.head_dim, "halves", options.rope_factors),
        qk_norm_eps=config.norm_eps,
    )  # fmt: skip
    theta = reader.number("rope.freq_base_swa", LOCAL_THETA)
    local = replace(
        spec,
        rope=rope.make_table(rope.base_frequencies(config.head_dim, theta), "halves"),
        window=reader.integer("attention.sliding_window", high=1 << 31),
    )
    return Blueprint(
        config,
        tuple(spec if (i + 1) % PATTERN == 0 else local for i in range(config.num_layers)),
        activation="gelu_tanh",
        embed_scale=math.sqrt(config.hidden_size),
        post_norms=True,
        logit_softcap=reader.optional_number("final_logit_softcapping"),
    )


FAMILY = Family(
    "gemma3",
    ("gemma3_text", "gemma3"),
    ("gemma3",),
    from_hf,
    from_gguf,
    hf_names=HF_NAMES,
    gguf_names=GGUF_NAMES,
    hf_ignored=decoder.HF_IGNORED + r"|vision_tower\.|multi_modal_projector\.|^language_model\.lm_head\.weight$",
)
