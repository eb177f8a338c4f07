"""Every family's logits equal transformers' on tiny random models: whole, with cache, in chunks, in ragged batches."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from kvarn.backends import InputBatch, KvCacheSpec, StepLimits
from kvarn.backends.reference import ReferenceBackend
from kvarn.models import load_model
from kvarn.weights import open_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, BLOCK = 97, 16
BASE = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3, 2.0],
            "long_factor": [1.0, 2.0, 4.0, 8.0], "factor": 4.0, "original_max_position_embeddings": 256}  # fmt: skip

CASES = {
    "llama-gqa": ("Llama", {}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-mqa-biases": ("Llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("Llama", {"head_dim": 20, "rms_norm_eps": 1e-3, "hidden_act": "gelu"}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.3, "truncate": False}}),
    "llama-longrope": ("Llama", {"rope_parameters": LONGROPE}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7, "head_dim": 10}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3-bias-tied": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 11, "query_pre_attn_scalar": 24, "num_hidden_layers": 7}),
    "gemma3-types": (
        "Gemma3",
        {"head_dim": 8, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
         "final_logit_softcapping": 3.0},
    ),
    "gpt2": ("GPT2", {}),
    "gpt2-variants": ("GPT2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu", "n_inner": 56}),
}  # fmt: skip


def make_config(kind, changes):
    if kind == "GPT2":
        return transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2, **changes
        )
    settings = {**BASE, **changes}
    if kind == "Gemma3":
        return transformers.Gemma3TextConfig(**settings)
    return getattr(transformers, f"{kind}Config")(**settings)


@dataclasses.dataclass
class Pair:
    oracle: object
    folder: Path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Oracle and saved folder by case, each made once."""
    made = {}

    def get(name):
        if name not in made:
            kind, changes = CASES[name]
            torch.manual_seed(list(CASES).index(name))
            config = make_config(kind, changes)
            config._attn_implementation = "eager"
            oracle = {"GPT2": transformers.GPT2LMHeadModel, "Gemma3": transformers.Gemma3ForCausalLM}.get(
                kind, getattr(transformers, f"{kind}ForCausalLM", None)
            )(config)
            with torch.no_grad():
                for parameter in oracle.parameters():  # norms and biases too, so that none goes unnoticed
                    parameter.normal_(0.0, 0.3)
            folder = tmp_path_factory.mktemp(name)
            oracle.eval().save_pretrained(folder)
            made[name] = Pair(oracle, folder)
        return made[name]

    return get


def oracle_logits(oracle, ids):
    with torch.no_grad():
        return oracle(torch.from_numpy(ids)[None]).logits[0].float().numpy()


def step(executable, spans, tables):
    """Runs one step of several sequences: spans of (token ids, start), logits of all rows."""
    counts = [len(ids) for ids, _ in spans]
    positions = np.concatenate([np.arange(start, start + len(ids)) for ids, start in spans]).astype(np.int32)
    owner = np.repeat(np.arange(len(spans)), counts)
    table = np.asarray(tables, dtype=np.int32)
    return executable.execute(
        InputBatch(
            token_ids=np.concatenate([ids for ids, _ in spans]).astype(np.int32),
            positions=positions,
            slot_mapping=table[owner, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK,
            query_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            seq_lens=np.array([start + len(ids) for ids, start in spans], dtype=np.int32),
            block_tables=table,
            output_rows=np.arange(sum(counts), dtype=np.int32),
        )
    )["logits"].copy()


def load(pair):
    files = open_model(pair.folder)
    model = load_model(files)
    return ReferenceBackend().load(
        model.program, model.weights, KvCacheSpec(32, BLOCK, "float32"), StepLimits(256, 8, 256)
    )


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def sample_ids(count, seed):
    return np.random.default_rng(seed).integers(0, VOCAB, count)


@pytest.mark.parametrize("name", CASES)
def test_a_whole_prompt(pairs, name):
    pair = pairs(name)
    ids = sample_ids(90, 1)
    close(step(load(pair), [(ids, 0)], [range(6)]), oracle_logits(pair.oracle, ids))


@pytest.mark.parametrize("name", CASES)
def test_token_by_token_and_in_chunks(pairs, name):
    pair = pairs(name)
    ids = sample_ids(40, 2)
    want = oracle_logits(pair.oracle, ids)
    table = [[5, 2, 9]]
    executable = load(pair)
    close(np.concatenate([step(executable, [(ids[i : i + 1], i)], table) for i in range(40)]), want)
    executable = load(pair)
    cuts = [0, 3, 4, 20, 33, 40]
    chunks = [step(executable, [(ids[a:b], a)], table) for a, b in itertools.pairwise(cuts)]
    close(np.concatenate(chunks), want)


@pytest.mark.parametrize("name", CASES)
def test_ragged_batches(pairs, name):
    """Three sequences of different lengths, one prefilling while others decode, in scattered blocks."""
    pair = pairs(name)
    a, b, c = sample_ids(21, 3), sample_ids(35, 4), sample_ids(18, 5)
    tables = [[7, 1, 30], [3, 12, 4], [20, 19, 0]]
    executable = load(pair)
    first = step(executable, [(a[:20], 0), (b[:17], 0)], tables[:2])
    second = step(executable, [(a[20:], 20), (b[17:], 17), (c, 0)], tables)
    close(np.concatenate([first[:20], second[:1]]), oracle_logits(pair.oracle, a))
    close(np.concatenate([first[20:], second[1:19]]), oracle_logits(pair.oracle, b))
    close(second[19:], oracle_logits(pair.oracle, c))
