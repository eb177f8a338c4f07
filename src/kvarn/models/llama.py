"""Llama (Touvron et al. 2023; Llama 3) and the many models of its shape: SmolLM2, TinyLlama, Yi, …"""

from __future__ import annotations

from dataclasses import replace

from kvarn.models import decoder, rope
from kvarn.models.blocks import AttentionSpec
from kvarn.models.config import ConfigReader
from kvarn.models.decoder import Blueprint
from kvarn.models.family import Family, LoadOptions


def from_hf(reader: ConfigReader, options: LoadOptions) -> Blueprint:
    """Reads a config.json of model_type llama, or of a family that spells its fields as Llama does."""
    config = decoder.config_from_hf(reader, "llama", tie_default=False)
    section = rope.hf_section(reader)
    table = rope.table_from_hf(
        reader,
        section,
        config.head_dim,
        theta=reader.number("rope_theta", rope.DEFAULT_THETA, low=1.0),
        max_positions=config.max_positions,
        max_model_len=options.max_model_len,
    )
    bias = reader.boolean("attention_bias", False)
    spec = AttentionSpec(
        config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim**-0.5, table,
        qkv_bias=bias, out_bias=bias,
    )  # fmt: skip
    return Blueprint(
        replace(config, max_positions=rope.hf_max_positions(section, config.max_positions)),
        decoder.same_layers(config, spec),
        activation=decoder.activation_of(reader),
        mlp_bias=reader.boolean("mlp_bias", False),
    )


def from_gguf(reader: ConfigReader, options: LoadOptions) -> Blueprint:
    """Reads GGUF metadata of architecture llama, whose query and key rows are permuted for interleaved rotation."""
    config = decoder.config_from_gguf(reader, "llama")
    rotary = reader.integer("rope.dimension_count", config.head_dim, high=config.head_dim)
    spec = AttentionSpec(
        config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim**-0.5,
        rope.table_from_gguf(reader, rotary, "interleaved", options.rope_factors),
        window=decoder.window_size(reader, "attention.sliding_window"),
        qkv_bias=reader.has_tensor("blk.0.attn_q.bias"), out_bias=reader.has_tensor("blk.0.attn_output.bias"),
    )  # fmt: skip
    return Blueprint(
        replace(config, max_positions=rope.gguf_max_positions(reader, config.max_positions)),
        decoder.same_layers(config, spec),
        mlp_bias=reader.has_tensor("blk.0.ffn_gate.bias"),
    )


FAMILY = Family("llama", ("llama",), ("llama",), from_hf, from_gguf)
