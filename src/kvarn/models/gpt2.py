"""GPT-2 (Radford et al. 2019): layer norms, learned positions, biases everywhere, one fused query-key-value matrix."""

from __future__ import annotations

from dataclasses import replace

from kvarn.models import decoder
from kvarn.models.blocks import AttentionSpec, attention, plain_mlp
from kvarn.models.builder import ProgramBuilder
from kvarn.models.config import MAX_LAYERS, ConfigReader, ModelConfig
from kvarn.models.decoder import Blueprint
from kvarn.models.family import Family, LoadOptions
from kvarn.models.source import NameMap, TensorRef
from kvarn.program import Program

KINDS = ("weight", "bias")


def _names(layer: str, norms: tuple[str, str], fused: str, linears: tuple[str, str, str], *, turned: bool) -> NameMap:
    """Tensor names of a layer. turned: matrices are stored (in, out), as GPT-2's own Conv1D has them."""
    names: dict[str, TensorRef] = {}
    for kind in KINDS:
        transpose = turned and kind == "weight"
        for ours, theirs in zip(("attn_norm", "mlp_norm"), norms, strict=True):
            names[f"layers.{{i}}.{ours}.{kind}"] = TensorRef(f"{layer}.{theirs}.{kind}")
        for index, part in enumerate("qkv"):
            ref = TensorRef(f"{layer}.{fused}.{kind}", transpose, (index, 3))
            names[f"layers.{{i}}.attn.{part}.{kind}"] = ref
        for ours, theirs in zip(("attn.o", "mlp.up", "mlp.down"), linears, strict=True):
            names[f"layers.{{i}}.{ours}.{kind}"] = TensorRef(f"{layer}.{theirs}.{kind}", transpose)
    return names


HF_NAMES: NameMap = {
    "embed.weight": TensorRef("wte.weight"),
    "position_embed.weight": TensorRef("wpe.weight"),
    "norm.weight": TensorRef("ln_f.weight"),
    "norm.bias": TensorRef("ln_f.bias"),
    "lm_head.weight": TensorRef("lm_head.weight"),
    **_names("h.{i}", ("ln_1", "ln_2"), "attn.c_attn", ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"), turned=True),
}
GGUF_NAMES: NameMap = {
    "embed.weight": TensorRef("token_embd.weight"),
    "position_embed.weight": TensorRef("position_embd.weight"),
    "norm.weight": TensorRef("output_norm.weight"),
    "norm.bias": TensorRef("output_norm.bias"),
    "lm_head.weight": TensorRef("output.weight"),
    **_names("blk.{i}", ("attn_norm", "ffn_norm"), "attn_qkv", ("attn_output", "ffn_up", "ffn_down"), turned=False),
}


def _blueprint(config: ModelConfig, scales: list[float]) -> Blueprint:
    spec = AttentionSpec(config.num_heads, config.num_kv_heads, config.head_dim, 1.0, qkv_bias=True, out_bias=True)
    return Blueprint(config, tuple(replace(spec, scale=scale) for scale in scales), activation="gelu_tanh")


def from_hf(reader: ConfigReader, _: LoadOptions) -> Blueprint:
    """Reads a config.json of model_type gpt2."""
    if reader.boolean("add_cross_attention", False):
        raise reader.unsupported("add_cross_attention", "is not supported")
    hidden, heads = reader.integer("n_embd", 768), reader.integer("n_head", 12, high=1 << 16)
    if hidden % heads:
        raise reader.fail("n_embd", f"must be a multiple of n_head ({heads}), not {hidden}")
    layers = reader.integer("n_layer", 12, high=MAX_LAYERS)
    head_dim = hidden // heads
    config = ModelConfig(
        family="gpt2",
        vocab_size=reader.integer("vocab_size", 50257),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("n_inner", 4 * hidden),
        max_positions=reader.integer("n_positions", 1024, high=1 << 24),
        tie_embeddings=reader.boolean("tie_word_embeddings", True),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5, high=1.0),
        bos_token_id=next(iter(reader.token_ids("bos_token_id")), None),
        eos_token_ids=reader.token_ids("eos_token_id"),
    )
    base = head_dim**-0.5 if reader.boolean("scale_attn_weights", True) else 1.0
    by_layer = reader.boolean("scale_attn_by_inverse_layer_idx", False)
    blueprint = _blueprint(config, [base / (i + 1) if by_layer else base for i in range(layers)])
    return replace(blueprint, activation=decoder.activation_of(reader, "activation_function", "gelu_new"))


def from_gguf(reader: ConfigReader, _: LoadOptions) -> Blueprint:
    """Reads GGUF metadata of architecture gpt2."""
    config = decoder.config_from_gguf(reader, "gpt2")
    config = replace(config, norm_eps=reader.number("attention.layer_norm_epsilon", 1e-5, high=1.0))
    return _blueprint(config, [config.head_dim**-0.5] * config.num_layers)


def build(blueprint: Blueprint) -> Program:
    """The program of GPT-2."""
    config = blueprint.config
    b = ProgramBuilder("gpt2", config.vocab_size, config.hidden_size, config.max_positions)
    b.embed("x")
    b.position_embed("x")
    for i, spec in enumerate(blueprint.layers):
        b.layer_norm("h", "x", f"layers.{i}.attn_norm", config.norm_eps)
        b.add("x", attention(b, i, "h", spec))
        b.layer_norm("h", "x", f"layers.{i}.mlp_norm", config.norm_eps)
        b.add("x", plain_mlp(b, i, "h", config.intermediate_size, blueprint.activation))
    b.select_rows("last", "x")
    b.layer_norm("last", "last", "norm", config.norm_eps)
    b.logits("last", tied=config.tie_embeddings)
    return b.build()


FAMILY = Family(
    "gpt2",
    ("gpt2",),
    ("gpt2",),
    from_hf,
    from_gguf,
    build,
    HF_NAMES,
    GGUF_NAMES,
    hf_prefixes=("transformer.", ""),
    hf_ignored=r"\.attn\.(masked_)?bias$|^lm_head\.weight$",
)
