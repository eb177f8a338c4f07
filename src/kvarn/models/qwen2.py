"""Qwen2 and Qwen2.5 (Yang et al. 2024): biases on queries, keys and values."""

from __future__ import annotations

from dataclasses import replace

from kvarn.models import decoder, llama, rope
from kvarn.models.blocks import AttentionSpec
from kvarn.models.config import ConfigReader
from kvarn.models.decoder import Blueprint
from kvarn.models.family import Family, LoadOptions

HF_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096}
"""What transformers assumes where a config.json is silent (and not null)."""


def windowed(reader: ConfigReader, blueprint: Blueprint) -> Blueprint:
    """With the sliding window that `use_sliding_window`, `max_window_layers` and `layer_types` describe."""
    window = decoder.window_size(reader) if reader.boolean("use_sliding_window", False) else None
    first = reader.integer("max_window_layers", 28, low=0)
    layers = decoder.windowed_layers(reader, blueprint.config, blueprint.layers[0], window, first)
    return replace(blueprint, layers=layers)


def from_hf(reader: ConfigReader, options: LoadOptions) -> Blueprint:
    """Reads a config.json of model_type qwen2."""
    reader = reader.filled(HF_DEFAULTS)
    base = llama.from_hf(reader, options)
    layers = tuple(replace(spec, qkv_bias=True, out_bias=False) for spec in base.layers)
    return windowed(reader, replace(base, config=replace(base.config, family="qwen2"), layers=layers, mlp_bias=False))


def gguf_blueprint(reader: ConfigReader, options: LoadOptions, family: str) -> Blueprint:
    """What the GGUF architectures qwen2 and qwen3 have in common: rotation in halves, no window."""
    config = decoder.config_from_gguf(reader, family)
    spec = AttentionSpec(
        config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim**-0.5,
        rope.table_from_gguf(reader, config.head_dim, "halves", options.rope_factors),
    )  # fmt: skip
    config = replace(config, max_positions=rope.gguf_max_positions(reader, config.max_positions))
    return Blueprint(config, decoder.same_layers(config, spec))


def from_gguf(reader: ConfigReader, options: LoadOptions) -> Blueprint:
    """Reads GGUF metadata of architecture qwen2."""
    base = gguf_blueprint(reader, options, "qwen2")
    return replace(base, layers=tuple(replace(spec, qkv_bias=True) for spec in base.layers))


FAMILY = Family("qwen2", ("qwen2",), ("qwen2",), from_hf, from_gguf)
