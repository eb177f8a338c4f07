"""Models of known shapes with random weights, and how large everything is: on a card, and to see that it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 16384,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
QWEN_1_5B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True)
class Heads:
    """Of an attention: query heads, KV heads, elements of a head."""

    query: int
    kv: int
    dim: int


@dataclass(frozen=True, slots=True)
class Streams:
    """Requests that come all at once: how many, with so many prompt tokens, and so many to say."""

    count: int
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Everything that is larger on a card than where only the way is tried."""

    models: dict[str, dict[str, Any]]
    """config.json by name. The first is the one that bounds are given for."""
    weights: tuple[str, ...]
    kv_type: str
    """Of the cache where nothing else is said: the default of `kvarn serve`."""
    kv_types: tuple[str, ...]
    """Others that decode is timed with."""
    decode_batches: tuple[int, ...]
    decode_context: int
    """Tokens of each sequence whose next one is timed."""
    prefill_lengths: tuple[int, ...]
    heads: Heads
    attention_lengths: tuple[int, ...]
    naive_most: int
    """Tokens beyond which naive attention is not run: N² of scores for each head."""
    decode_attention: tuple[tuple[int, int], ...]
    """(sequences, tokens of context)."""
    int4_group: int
    """Weights that share a scale."""
    linear_forms: tuple[str, ...]
    linears: tuple[tuple[int, int], ...]
    """(output, input) widths."""
    linear_rows: tuple[int, ...]
    copy_mib: tuple[int, ...]
    matmul: tuple[int, ...]
    streams: Streams
    continuous: dict[str, int]
    """What transformers' continuous batching is told beside its defaults."""
    dtype: str
    """Of activations."""


FULL = Sizes(
    models={"Llama-3-8B": LLAMA_3_8B, "Qwen2.5-1.5B": QWEN_1_5B},
    weights=("bf16", "int8", "fp8", "int4"),
    kv_type="float16",
    kv_types=("int8", "fp8_e4m3"),
    decode_batches=(1, 16, 64, 256),
    decode_context=512,
    prefill_lengths=(512, 2048, 8192),
    heads=Heads(32, 8, 128),
    attention_lengths=(512, 1024, 2048, 4096, 8192, 16384),
    naive_most=8192,
    decode_attention=((1, 8192), (16, 8192), (64, 8192)),
    int4_group=128,
    linear_forms=("bf16", "int8", "fp8", "int4"),
    linears=((6144, 4096), (4096, 4096), (14336, 4096), (4096, 14336)),
    linear_rows=(1, 16, 64, 256, 2048),
    copy_mib=(1024, 4096),
    matmul=(4096, 8192),
    streams=Streams(64, 128, 128),
    continuous={},
    dtype="bfloat16",
)
SMALL = Sizes(
    models={"tiny": TINY},
    weights=("bf16", "int8"),
    kv_type="float16",
    kv_types=("int8", "fp8_e4m3"),
    decode_batches=(1,),
    decode_context=4,
    prefill_lengths=(4,),
    heads=Heads(2, 1, 16),
    attention_lengths=(32,),
    naive_most=32,
    decode_attention=((2, 32),),
    int4_group=32,
    linear_forms=("bf16", "int8", "fp8", "int4"),
    linears=((32, 64),),
    linear_rows=(1, 3),
    copy_mib=(1,),
    matmul=(64,),
    streams=Streams(2, 4, 2),
    continuous={"num_blocks": 4, "max_batch_tokens": 64},
    dtype="float16",
)
"""fp16: the interpreter computes in it, and NumPy has no bf16."""
