"""Tiny random models of transformers, saved as checkpoints: what kvarn's families are held against."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 97
BASE = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3, 2.0],
            "long_factor": [1.0, 2.0, 4.0, 8.0], "factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
GEMMA_ROPES = {"sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
               "full_attention": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 8.0}}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("Llama", {}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-mqa-biases": ("Llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("Llama", {"head_dim": 20, "rms_norm_eps": 1e-3, "hidden_act": "gelu"}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-attention": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.3, "truncate": False}}),
    "llama-yarn-mscale": (
        "Llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.4, "beta_fast": 16, "beta_slow": 2}}
    ),
    "llama-yarn-betas": (
        "Llama", {"rope_parameters": {**YARN, "original_max_position_embeddings": 10000, "beta_fast": 4.0}}
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7, "head_dim": 10}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen2-unused-window": ("Qwen2", {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3-bias-tied": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-window": (
        "Qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
    ),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 11, "query_pre_attn_scalar": 24, "num_hidden_layers": 7}),
    "gemma3-types": (
        "Gemma3",
        {"head_dim": 8, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
         "final_logit_softcapping": 3.0},
    ),
    "gemma3-ropes-biases": (
        "Gemma3",
        {"head_dim": 10, "sliding_window": 13, "sliding_window_pattern": 2, "attention_bias": True,
         "rope_parameters": GEMMA_ROPES},
    ),
    "gpt2": ("GPT2", {}),
    "gpt2-variants": ("GPT2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu", "n_inner": 56}),
    "gpt2-odd-heads-untied": ("GPT2", {"n_embd": 45, "n_head": 5, "tie_word_embeddings": False}),
    "gpt2-unscaled": ("GPT2", {"scale_attn_weights": False}),
}  # fmt: skip
"""Name: transformers' class and what differs from BASE or GPT2."""
FAMILIES = {"llama": "llama-gqa", "mistral": "mistral-window", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3",
            "gpt2": "gpt2"}  # fmt: skip
"""One case of each family."""


@dataclasses.dataclass
class Oracle:
    """A model of transformers and the folder it was saved in."""

    model: Any
    folder: Path

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32[tokens, vocab] of one whole sequence."""
        import torch

        with torch.no_grad():
            return self.model(torch.from_numpy(np.asarray(ids, np.int64))[None]).logits[0].float().numpy()


def make_oracle(kind: str, changes: dict[str, Any], folder: Path, seed: int) -> Oracle:
    """A random model, saved in `folder`."""
    import transformers

    settings = {**(GPT2 if kind == "GPT2" else BASE), **changes}
    config_class = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    model_class = {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    config = getattr(transformers, config_class)(**settings)
    return save(getattr(transformers, model_class)(config), folder, seed)


def save(model: Any, folder: Path, seed: int) -> Oracle:
    """Gives every parameter random values, norms and biases too so that none goes unnoticed, and saves the model."""
    import torch

    torch.manual_seed(seed)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.eval().save_pretrained(folder)
    return Oracle(model, folder)
