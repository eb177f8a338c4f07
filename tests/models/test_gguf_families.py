"""The same logits from GGUF files, converted from transformers' models with the `gguf` package's own names."""

import numpy as np
import pytest
from logits import assert_close, load, sample_ids, step, whole
from oracles import LLAMA3, YARN, make_oracle

pytest.importorskip("gguf", reason="GGUF files are written with the gguf package")
pytest.importorskip("transformers", reason="the oracle is transformers")

import gguf
from gguf_oracle import write

LINEAR, YARNED = gguf.RopeScalingType.LINEAR, gguf.RopeScalingType.YARN
GLOBAL_LINEAR = {"full_attention": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 8.0},
                 "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}  # fmt: skip


def llama3_factors(head_dim):
    """What llama.cpp's converter stores: base frequency / scaled frequency, float32."""
    base = 10000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    waves = 2 * np.pi / base
    low, high, original, factor = 1.0, 4.0, LLAMA3["original_max_position_embeddings"], LLAMA3["factor"]
    smooth = (original / waves - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    return np.where(waves < original / high, 1.0, np.where(waves > original / low, factor, blended)).astype(np.float32)


CASES = {
    "llama": ("Llama", {}, [("add_rope_freq_base", 10000.0), ("add_rope_dimension_count", 8)]),
    "llama-tied-biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, []),
    "llama-wide-heads": ("Llama", {"head_dim": 20}, [("add_rope_dimension_count", 20)]),
    "llama-linear": (
        "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
        [("add_rope_freq_base", 500.0), ("add_rope_scaling_type", LINEAR), ("add_rope_scaling_factor", 4.0)],
    ),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}, []),
    "mistral-window": ("Mistral", {"sliding_window": 7}, [("add_sliding_window", 7)]),
    "qwen2": ("Qwen2", {}, []),
    "qwen2-yarn": (
        "Qwen2", {"rope_parameters": YARN},
        [("add_rope_scaling_type", YARNED), ("add_rope_scaling_factor", 4.0), ("add_rope_scaling_orig_ctx_len", 64)],
    ),
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}, []),
    "gemma3": (
        "Gemma3", {"head_dim": 16, "sliding_window": 11, "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
        [("add_sliding_window", 11), ("add_rope_freq_base", 1e6)],
    ),
    "gemma3-linear": (
        "Gemma3", {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8, "num_hidden_layers": 4,
                   "rope_parameters": GLOBAL_LINEAR, "sliding_window_pattern": 2},
        [("add_sliding_window", 5), ("add_rope_freq_base", 20000.0), ("add_rope_scaling_type", LINEAR),
         ("add_rope_scaling_factor", 8.0), ("add_sliding_window_pattern", [True, False, True, False])],
    ),
    "gpt2": ("GPT2", {}, []),
    "gpt2-odd-heads-untied": ("GPT2", {"n_embd": 45, "n_head": 5, "tie_word_embeddings": False}, []),
}  # fmt: skip
"""Name: transformers' class, what differs from its base, and the GGUF fields that say so."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The oracle and the GGUF file of a case, each made once."""
    made = {}

    def get(name):
        if name not in made:
            kind, changes, pairs = CASES[name]
            folder = tmp_path_factory.mktemp(name)
            oracle = make_oracle(kind, changes, folder, seed=list(CASES).index(name))
            tensors = [("rope_freqs.weight", llama3_factors(8))] if name == "llama-llama3" else []
            made[name] = oracle, write(folder / "model.gguf", oracle.model, pairs, tensors)
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_a_whole_prompt(converted, name):
    oracle, path = converted(name)
    ids = sample_ids(90, 1)
    assert_close(whole(load(path), ids), oracle.logits(ids))


@pytest.mark.parametrize("name", CASES)
def test_ragged_batches_with_cache(converted, name):
    oracle, path = converted(name)
    a, b = sample_ids(21, 3), sample_ids(35, 4)
    tables = [[7, 1, 30], [3, 12, 4]]
    executable = load(path)
    first = step(executable, [(a[:20], 0), (b[:17], 0)], tables)
    second = step(executable, [(a[20:], 20), (b[17:], 17)], tables)
    assert_close(np.concatenate([first[:20], second[:1]]), oracle.logits(a))
    assert_close(np.concatenate([first[20:], second[1:]]), oracle.logits(b))
