"""Qwen2 and Qwen2.5 (Yang et al. 2024): biases on queries, keys and values."""

from __future__ import annotations

from dataclasses import replace

from kvarn.models import decoder, llama
from kvarn.models.blocks import AttentionSpec
from kvarn.models.config import ConfigReader
from kvarn.models.decoder import Blueprint
from kvarn.models.family import Family, LoadOptions
from kvarn.models.rope import table_from_gguf


def windowed(reader: ConfigReader, blueprint: Blueprint) -> Blueprint:
    """With the sliding window that `use_sliding_window`, `max_window_layers` and `layer_types` describe."""
    window = decoder.window_size(reader) if reader.boolean("use_sliding_window", False) else None
    first = reader.integer("max_window_layers", 28, low=0)
    layers = decoder.windowed_layers(reader, blueprint.config, blueprint.layers[0], window, first)
    return replace(blueprint, layers=layers)


def from_hf(reader: ConfigReader, options: LoadOptions) -> Blueprint:
    """Reads a config.json of model_type qwen2."""
    base = llama.from_hf(reader, options)
    layers = tuple(replace(spec, qkv_bias=True, out_bias=False) for spec in base.layers)
    return windowed(reader, replace(base, config=replace(base.config, family="qwen2"), layers=layers, mlp_bias=False))


def from_gguf(reader: ConfigReader, options: LoadOptions) -> Blueprint:
    """Reads GGUF metadata of architecture qwen2."""
    config = decoder.config_from_gguf(reader, "qwen2")
    spec = AttentionSpec(
        config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim**-0.5,
        table_from_gguf(reader, config.head_dim, "halves", options.rope_factors),
        qkv_bias=True,
    )  # fmt: skip
    return Blueprint(config, decoder.same_layers(config, spec))


FAMILY = Family("qwen2", ("qwen2",), ("qwen2",), from_hf, from_gguf)
