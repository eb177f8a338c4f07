"""What llama-like decoders share: config fields in both formats, the program, and tensor names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvarn.models.blocks import AttentionSpec, attention, gated_mlp
from kvarn.models.builder import Function, ProgramBuilder
from kvarn.models.config import MAX_LAYERS, ConfigReader, ModelConfig, shown
from kvarn.models.source import NameMap, TensorRef
from kvarn.program import Program

HF_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu",
}  # fmt: skip

HF_NAMES: NameMap = {
    "embed.weight": TensorRef("embed_tokens.weight"),
    "norm.weight": TensorRef("norm.weight"),
    "lm_head.weight": TensorRef("lm_head.weight"),
    "layers.{i}.attn_norm.weight": TensorRef("layers.{i}.input_layernorm.weight"),
    "layers.{i}.mlp_norm.weight": TensorRef("layers.{i}.post_attention_layernorm.weight"),
    **{
        f"layers.{{i}}.attn.{ours}.{kind}": TensorRef(f"layers.{{i}}.self_attn.{theirs}.{kind}")
        for ours, theirs in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}.items()
        for kind in ("weight", "bias")
    },
    **{f"layers.{{i}}.attn.{n}.weight": TensorRef(f"layers.{{i}}.self_attn.{n}.weight") for n in ("q_norm", "k_norm")},
    **{
        f"layers.{{i}}.mlp.{n}.{kind}": TensorRef(f"layers.{{i}}.mlp.{n}_proj.{kind}")
        for n in ("gate", "up", "down")
        for kind in ("weight", "bias")
    },
}
"""Without the checkpoint's prefix ("model.")."""

HF_PREFIXES = ("model.", "", "model.language_model.", "language_model.model.")
HF_IGNORED = r"rotary_emb\.inv_freq$|^lm_head\.weight$"

GGUF_NAMES: NameMap = {
    "embed.weight": TensorRef("token_embd.weight"),
    "norm.weight": TensorRef("output_norm.weight"),
    "lm_head.weight": TensorRef("output.weight"),
    "layers.{i}.attn_norm.weight": TensorRef("blk.{i}.attn_norm.weight"),
    "layers.{i}.mlp_norm.weight": TensorRef("blk.{i}.ffn_norm.weight"),
    **{
        f"layers.{{i}}.attn.{ours}.{kind}": TensorRef(f"blk.{{i}}.attn_{theirs}.{kind}")
        for ours, theirs in {"q": "q", "k": "k", "v": "v", "o": "output"}.items()
        for kind in ("weight", "bias")
    },
    **{f"layers.{{i}}.attn.{n}.weight": TensorRef(f"blk.{{i}}.attn_{n}.weight") for n in ("q_norm", "k_norm")},
    **{
        f"layers.{{i}}.mlp.{n}.{kind}": TensorRef(f"blk.{{i}}.ffn_{n}.{kind}")
        for n in ("gate", "up", "down")
        for kind in ("weight", "bias")
    },
}
GGUF_IGNORED = r"^rope_freqs\.weight$|^output\.weight$"


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A decoder's config in the form its program is built from. layers: each layer's attention."""

    config: ModelConfig
    layers: tuple[AttentionSpec, ...]
    activation: Function = "silu"
    mlp_bias: bool = False
    embed_scale: float = 1.0
    post_norms: bool = False
    """Norms after attention and MLP, before the residual (Gemma)."""
    logit_softcap: float | None = None


def decoder_program(blueprint: Blueprint) -> Program:
    """The program of a pre-norm decoder with RMS norms and gated MLPs."""
    config = blueprint.config
    eps = config.norm_eps
    b = ProgramBuilder(config.family, config.vocab_size, config.hidden_size, config.max_positions)
    after: Callable[[str, str], None] = (
        (lambda branch, name: b.rms_norm(branch, branch, name, eps)) if blueprint.post_norms else lambda *_: None
    )
    b.embed("x", blueprint.embed_scale)
    for i, spec in enumerate(blueprint.layers):
        b.rms_norm("h", "x", f"layers.{i}.attn_norm", eps)
        branch = attention(b, i, "h", spec)
        after(branch, f"layers.{i}.attn_post_norm")
        b.add("x", branch)
        b.rms_norm("h", "x", f"layers.{i}.mlp_norm", eps)
        branch = gated_mlp(b, i, "h", config.intermediate_size, blueprint.activation, blueprint.mlp_bias)
        after(branch, f"layers.{i}.mlp_post_norm")
        b.add("x", branch)
    b.select_rows("last", "x")
    b.rms_norm("last", "last", "norm", eps)
    b.logits("last", tied=config.tie_embeddings, softcap=blueprint.logit_softcap)
    return b.build()


def config_from_hf(reader: ConfigReader, family: str, *, tie_default: bool) -> ModelConfig:
    """The fields that llama-like config.json files share. Raises ModelFileError, UnsupportedModelError."""
    hidden = reader.integer("hidden_size")
    heads = reader.integer("num_attention_heads", high=1 << 16)
    kv_heads = reader.integer("num_key_value_heads", heads, high=1 << 16)
    if heads % kv_heads:
        raise reader.fail("num_key_value_heads", f"must divide num_attention_heads ({heads}), not {kv_heads}")
    if reader.get("head_dim") is None and hidden % heads:
        raise reader.fail("hidden_size", f"must be a multiple of num_attention_heads ({heads}), not {hidden}")
    head_dim = reader.integer("head_dim", max(hidden // heads, 1), high=1 << 12)
    return ModelConfig(
        family=family,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=reader.integer("num_hidden_layers", high=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("intermediate_size"),
        max_positions=reader.integer("max_position_embeddings", 2048, high=1 << 31),
        tie_embeddings=reader.boolean("tie_word_embeddings", tie_default),
        norm_eps=reader.number("rms_norm_eps", 1e-6, high=1.0),
        bos_token_id=next(iter(reader.token_ids("bos_token_id")), None),
        eos_token_ids=reader.token_ids("eos_token_id"),
    )


def config_from_gguf(reader: ConfigReader, family: str) -> ModelConfig:
    """The fields that llama-like GGUF files share; `reader` has the architecture's prefix."""
    hidden = reader.integer("embedding_length")
    heads = reader.integer("attention.head_count", high=1 << 16)
    kv_heads = reader.integer("attention.head_count_kv", heads, high=1 << 16)
    if heads % kv_heads:
        raise reader.fail("attention.head_count_kv", f"must divide attention.head_count ({heads}), not {kv_heads}")
    head_dim = reader.integer("attention.key_length", max(hidden // heads, 1), high=1 << 12)
    if reader.integer("attention.value_length", head_dim) != head_dim:
        raise reader.unsupported("attention.value_length", "values of another length than keys are not supported")
    tokens = ConfigReader(reader.values, path=reader.path, prefix="tokenizer.ggml.")
    listed = tokens.get("tokens")
    vocab = reader.integer("vocab_size", len(listed) if isinstance(listed, list) else None)
    eos = [i for key in ("eos_token_id", "eot_token_id", "eom_token_id") for i in tokens.token_ids(key)]
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=reader.integer("block_count", high=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("feed_forward_length"),
        max_positions=reader.integer("context_length", high=1 << 31),
        tie_embeddings=not reader.has_tensor("output.weight"),
        norm_eps=reader.number("attention.layer_norm_rms_epsilon", 1e-6, high=1.0),
        bos_token_id=next(iter(tokens.token_ids("bos_token_id")), None),
        eos_token_ids=tuple(dict.fromkeys(eos)),
    )


def same_layers(config: ModelConfig, spec: AttentionSpec) -> tuple[AttentionSpec, ...]:
    """Every layer alike."""
    return (spec,) * config.num_layers


def windowed_layers(
    reader: ConfigReader, config: ModelConfig, spec: AttentionSpec, window: int | None, first: int = 0
) -> tuple[AttentionSpec, ...]:
    """Layers with a sliding window where `layer_types` says so, or without it from layer `first` on."""
    if window is None:
        return same_layers(config, spec)
    kinds = layer_types(reader, config.num_layers)
    if kinds is None:
        kinds = tuple("sliding_attention" if i >= first else "full_attention" for i in range(config.num_layers))
    return tuple(replace(spec, window=window if kind == "sliding_attention" else None) for kind in kinds)


def layer_types(reader: ConfigReader, num_layers: int) -> tuple[str, ...] | None:
    """The list `layer_types` of a config.json; None where it has none."""
    kinds = reader.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(isinstance(kind, str) for kind in kinds):
        raise reader.fail("layer_types", f"must be a list of {num_layers} strings")
    known = ("full_attention", "sliding_attention")
    for kind in kinds:
        if kind not in known:
            raise reader.unsupported("layer_types", f"{shown(kind)} is not supported ({' and '.join(known)} are)")
    return tuple(kinds)


def window_size(reader: ConfigReader, key: str = "sliding_window") -> int | None:
    """The sliding window; None where it is absent or null."""
    return None if reader.get(key) is None else reader.integer(key, high=1 << 31)


def activation_of(reader: ConfigReader, key: str = "hidden_act", default: str = "silu") -> Function:
    """The activation by its Hugging Face name."""
    return reader.choice(key, default, HF_ACTIVATIONS)  # type: ignore[return-value]
