"""Qwen3 (Yang et al. 2025): no biases, an RMS norm on each query and key head."""

from __future__ import annotations

from dataclasses import replace

from kvarn.models import llama, qwen2
from kvarn.models.config import ConfigReader
from kvarn.models.decoder import Blueprint
from kvarn.models.family import Family, LoadOptions

HF_DEFAULTS = {**qwen2.HF_DEFAULTS, "head_dim": 128}
"""What transformers assumes where a config.json is silent (and not null)."""


def _with_qk_norm(blueprint: Blueprint) -> Blueprint:
    layers = tuple(replace(spec, qk_norm_eps=blueprint.config.norm_eps) for spec in blueprint.layers)
    return replace(blueprint, layers=layers)


def from_hf(reader: ConfigReader, options: LoadOptions) -> Blueprint:
    """Reads a config.json of model_type qwen3."""
    reader = reader.filled(HF_DEFAULTS)
    base = llama.from_hf(reader, options)
    base = replace(base, config=replace(base.config, family="qwen3"), mlp_bias=False)
    return qwen2.windowed(reader, _with_qk_norm(base))


def from_gguf(reader: ConfigReader, options: LoadOptions) -> Blueprint:
    """Reads GGUF metadata of architecture qwen3."""
    return _with_qk_norm(qwen2.gguf_blueprint(reader, options, "qwen3"))


FAMILY = Family("qwen3", ("qwen3",), ("qwen3",), from_hf, from_gguf)
