"""Gemma 3 (Gemma Team 2025), text only: local and global layers, norms around each block, QK-norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from kvarn.models import decoder, rope
from kvarn.models.blocks import AttentionSpec
from kvarn.models.builder import Function
from kvarn.models.config import ConfigReader, ModelConfig
from kvarn.models.decoder import Blueprint
from kvarn.models.family import Family, LoadOptions
from kvarn.models.source import NameMap, TensorRef
from kvarn.program import RopeTable

LOCAL_THETA = 10000.0
PERIOD = 6
"""Every sixth layer is global."""
LARGEST_LAYERS = 62
"""The 27B model, whose queries are scaled by hidden_size / num_heads instead of head_dim (GGUF does not say so)."""

HF_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
"""What transformers assumes where a config.json is silent (and not null), as the published ones of 4B and up are."""
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


def _text_config(reader: ConfigReader) -> ConfigReader:
    """The text model's config: the `text_config` of a gemma3, with the token ids that only the whole model names."""
    text = reader.section("text_config")
    if text is None:
        return reader.filled(HF_DEFAULTS)
    ends = list(dict.fromkeys((*reader.token_ids("eos_token_id"), *text.token_ids("eos_token_id"))))
    values = {**HF_DEFAULTS, "bos_token_id": reader.get("bos_token_id"), **text.values, "eos_token_id": ends}
    return ConfigReader(values, path=text.path, tensor_names=reader.tensor_names)


def _hf_ropes(reader: ConfigReader, config: ModelConfig, options: LoadOptions) -> tuple[RopeTable, RopeTable]:
    """The tables of local and global layers. `rope_scaling`, the old spelling, is of global layers only."""
    by_kind = reader.section("rope_parameters") or ConfigReader({}, path=reader.path)
    for key in by_kind.values:
        if key not in ("sliding_attention", "full_attention"):
            raise by_kind.fail(str(key)[:60], "rope_parameters must hold full_attention and sliding_attention only")
    local, everywhere = by_kind.section("sliding_attention"), by_kind.section("full_attention")
    old = reader.section("rope_scaling")
    if old is not None:
        everywhere = ConfigReader({**(everywhere.values if everywhere else {}), **old.values}, path=old.path)
    thetas = reader.number("rope_local_base_freq", LOCAL_THETA, low=1.0), reader.number("rope_theta", 1e6, low=1.0)
    local_table, global_table = (
        rope.table_from_hf(
            reader, section, config.head_dim, theta=theta,
            max_positions=config.max_positions, max_model_len=options.max_model_len,
        )
        for theta, section in zip(thetas, (local, everywhere), strict=True)
    )  # fmt: skip
    return local_table, global_table


def from_hf(reader: ConfigReader, options: LoadOptions) -> Blueprint:
    """Reads a config.json of model_type gemma3_text, or the text_config of gemma3."""
    reader = _text_config(reader)
    if reader.boolean("use_bidirectional_attention", False):
        raise reader.unsupported("use_bidirectional_attention", "attention to later tokens is not supported")
    if reader.get("attn_logit_softcapping") is not None:
        raise reader.unsupported("attn_logit_softcapping", "no Gemma 3 has it, and transformers ignores it")
    config = decoder.config_from_hf(reader, "gemma3", tie_default=True)
    local_rope, global_rope = _hf_ropes(reader, config, options)
    bias = reader.boolean("attention_bias", False)
    spec = AttentionSpec(
        config.num_heads, config.num_kv_heads, config.head_dim,
        reader.number("query_pre_attn_scalar", 256.0) ** -0.5, global_rope,
        qkv_bias=bias, out_bias=bias, qk_norm_eps=config.norm_eps,
    )  # fmt: skip
    local = replace(spec, rope=local_rope, window=decoder.window_size(reader))
    period = reader.integer("sliding_window_pattern", PERIOD, high=1 << 16)
    kinds = decoder.layer_types(reader, config.num_layers)
    is_local = _every(period, config) if kinds is None else [kind == "sliding_attention" for kind in kinds]
    activation = decoder.activation_of(reader, "hidden_activation", "gelu_pytorch_tanh")
    return _blueprint(reader, config, [local if sliding else spec for sliding in is_local], activation)


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
    theta = reader.number("rope.freq_base_swa", LOCAL_THETA, low=1.0)
    local = replace(
        spec,
        rope=rope.make_table(rope.base_frequencies(config.head_dim, theta), "halves"),
        window=reader.integer("attention.sliding_window", high=1 << 31),
    )
    is_local = _gguf_pattern(reader, config)
    return _blueprint(reader, config, [local if sliding else spec for sliding in is_local], "gelu_tanh")


def _gguf_pattern(reader: ConfigReader, config: ModelConfig) -> list[bool]:
    """Which layers are local: a flag per layer, or every how many layers one is global."""
    key = "attention.sliding_window_pattern"
    flags = reader.get(key)
    if not isinstance(flags, list):
        return _every(reader.integer(key, PERIOD, high=1 << 16), config)
    if len(flags) != config.num_layers or not all(isinstance(flag, bool) for flag in flags):
        raise reader.fail(key, f"must be {config.num_layers} booleans")
    return list(flags)


def _every(period: int, config: ModelConfig) -> list[bool]:
    return [(i + 1) % period != 0 for i in range(config.num_layers)]


def _blueprint(
    reader: ConfigReader, config: ModelConfig, layers: Sequence[AttentionSpec], activation: Function
) -> Blueprint:
    """What both formats share.

    Embeddings are scaled by sqrt(hidden_size), not rounded. transformers rounds it to the type of the weights, so in
    bfloat16 its hidden states start up to 0.2% larger or smaller; in float32, as here, it does not.
    """
    return Blueprint(
        config,
        tuple(layers),
        activation=activation,
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
