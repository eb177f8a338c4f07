"""Every family's logits equal transformers' on tiny random models: whole, with cache, in chunks, in ragged batches."""

import itertools
import json
import shutil

import numpy as np
import pytest
from logits import assert_close, load, sample_ids, step, whole
from oracles import CASES, FAMILIES, LONGROPE, Oracle, make_oracle, save

from kvarn.models import load_model
from kvarn.weights import open_model


@pytest.mark.parametrize("name", CASES)
def test_a_whole_prompt(oracle, name):
    ids = sample_ids(90, 1)
    assert_close(whole(load(oracle(name).folder), ids), oracle(name).logits(ids))


@pytest.mark.parametrize("name", CASES)
def test_token_by_token_and_in_chunks(oracle, name):
    ids = sample_ids(40, 2)
    want = oracle(name).logits(ids)
    table = [[5, 2, 9]]
    executable = load(oracle(name).folder)
    assert_close(np.concatenate([step(executable, [(ids[i : i + 1], i)], table) for i in range(40)]), want)
    executable = load(oracle(name).folder)
    cuts = [0, 3, 4, 20, 33, 40]
    chunks = [step(executable, [(ids[a:b], a)], table) for a, b in itertools.pairwise(cuts)]
    assert_close(np.concatenate(chunks), want)


@pytest.mark.parametrize("name", CASES)
def test_ragged_batches(oracle, name):
    """Three sequences of different lengths, one prefilling while others decode, in scattered blocks."""
    a, b, c = sample_ids(21, 3), sample_ids(35, 4), sample_ids(18, 5)
    tables = [[7, 1, 30], [3, 12, 4], [20, 19, 0]]
    executable = load(oracle(name).folder)
    first = step(executable, [(a[:20], 0), (b[:17], 0)], tables[:2])
    second = step(executable, [(a[20:], 20), (b[17:], 17), (c, 0)], tables)
    assert_close(np.concatenate([first[:20], second[:1]]), oracle(name).logits(a))
    assert_close(np.concatenate([first[20:], second[1:19]]), oracle(name).logits(b))
    assert_close(second[19:], oracle(name).logits(c))


def test_longrope_is_chosen_by_the_longest_sequence_that_will_be_run(oracle, tmp_path):
    made = make_oracle("Llama", {"rope_parameters": LONGROPE}, tmp_path, seed=0)
    ids = sample_ids(90, 1)
    assert_close(whole(load(tmp_path), ids), made.logits(ids))  # 90 > 64, the original length: long factors
    short = ids[:60]
    assert_close(whole(load(tmp_path, max_model_len=64), short), made.logits(short))
    with pytest.raises(AssertionError):  # the two sets do differ
        assert_close(whole(load(tmp_path), short), made.logits(short))


OLD_SPELLINGS = {
    "llama-linear": lambda rope: {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-llama3": lambda rope: {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope},
    "llama-yarn": lambda rope: {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope},
    "qwen2": lambda rope: {"rope_theta": rope["rope_theta"], "rope_scaling": None},
    "gemma3-ropes-biases": lambda rope: {
        "rope_theta": rope["full_attention"]["rope_theta"],
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
        "layer_types": None,
    },
}


@pytest.mark.parametrize("name", OLD_SPELLINGS)
def test_the_old_spelling_of_rope_fields(oracle, tmp_path, name):
    folder = shutil.copytree(oracle(name).folder, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    config.update(OLD_SPELLINGS[name](config.pop("rope_parameters")))
    (folder / "config.json").write_text(json.dumps(config))
    ids = sample_ids(70, 6)
    assert_close(whole(load(folder), ids), oracle(name).logits(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_checkpoints_are_run_in_float32(oracle, tmp_path, family):
    import torch

    model = oracle(FAMILIES[family]).model
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    model.float()
    rounded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    rounded.set_attn_implementation("eager")
    ids = sample_ids(30, 7)
    assert_close(whole(load(tmp_path), ids), Oracle(rounded.eval(), tmp_path).logits(ids))


def test_the_text_part_of_a_multimodal_gemma3(oracle, tmp_path):
    import transformers

    _, changes = CASES["gemma3"]
    text = {**make_text_config(changes), "vocab_size": 97}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=96, eos_token_id=[2, 5]
    )
    made = save(transformers.Gemma3ForConditionalGeneration(config), tmp_path, seed=3)
    ids = sample_ids(30, 8, vocab=90)
    assert_close(whole(load(tmp_path), ids), made.logits(ids))
    with open_model(tmp_path) as files:
        assert set(load_model(files).config.eos_token_ids) >= {2, 5}


def make_text_config(changes):
    import transformers
    from oracles import BASE

    return transformers.Gemma3TextConfig(**{**BASE, **changes}).to_dict()
