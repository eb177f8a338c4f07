"""Qwen3 (Yang et al. 2025): no biases, an RMS norm on each query and key head."""

from __future__ import annotations

from dataclasses import replace

from kvarn.models import decoder, llama, qwen2
from kvarn.models.blocks import AttentionSpec
from kvarn.models.config import ConfigReader
from kvarn.models.decoder import Blueprint
from kvarn.models.family import Family, LoadOptions
from kvarn.models.rope import table_from_gguf


def from_hf(reader: ConfigReader, options: LoadOptions) -> Blueprint:
    """Reads a config.json of model_type qwen3."""
    base = llama.from_hf(reader, options)
    config = replace(base.config, family="qwen3")
    layers = tuple(replace(spec, qk_norm_eps=config.norm_eps) for spec in base.layers)
    return qwen2.windowed(reader, replace(base, config=config, layers=layers, mlp_bias=False))


def from_gguf(reader: ConfigReader, options: LoadOptions) -> Blueprint:
    """Reads GGUF metadata of architecture qwen3."""
    config = decoder.config_from_gguf(reader, "qwen3")
    spec = AttentionSpec(
        config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim**-0.5,
        table_from_gguf(reader, config.head_dim, "halves", options.rope_factors),
        qk_norm_eps=config.norm_eps,
    )  # fmt: skip
    return Blueprint(config, decoder.same_layers(config, spec))


FAMILY = Family("qwen3", ("qwen3",), ("qwen3",), from_hf, from_gguf)
