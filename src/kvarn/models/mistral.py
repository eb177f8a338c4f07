"""Mistral (Jiang et al. 2023): Llama's shape with an optional sliding window. In GGUF it is architecture llama."""

from __future__ import annotations

from dataclasses import replace

from kvarn.models import decoder, llama
from kvarn.models.config import ConfigReader
from kvarn.models.decoder import Blueprint
from kvarn.models.family import Family, LoadOptions

HF_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
"""What transformers assumes where a config.json is silent (and not null)."""


def from_hf(reader: ConfigReader, options: LoadOptions) -> Blueprint:
    """Reads a config.json of model_type mistral."""
    reader = reader.filled(HF_DEFAULTS)
    base = llama.from_hf(reader, options)
    config = replace(base.config, family="mistral")
    layers = decoder.windowed_layers(reader, config, base.layers[0], decoder.window_size(reader))
    return replace(base, config=config, layers=layers)


FAMILY = Family("mistral", ("mistral",), (), from_hf, llama.from_gguf)
