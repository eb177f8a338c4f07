"""From files to weights: names and prefixes of checkpoints, transforms, and what is refused."""

import re

import numpy as np
import pytest

from kvarn.errors import ModelFileError, UnsupportedModelError
from kvarn.models import load_model
from kvarn.models.registry import find_family
from kvarn.models.source import reference_of, with_prefix
from kvarn.tensors import DType, Tensor
from kvarn.tensors.dequantize import dequantize
from kvarn.testing import MemoryFiles, random_tensor, tiny_gguf, tiny_model, write_gguf
from kvarn.testing.models import SETTINGS
from kvarn.weights import open_model


def checkpoint(family, prefix=None, generation=None, **changes):
    """A Hugging Face checkpoint in memory. prefix None: the family's usual one."""
    config = {"model_type": family, **SETTINGS[family], **changes}
    known, _ = find_family(config, "hf", "memory")
    names = with_prefix(known.hf_names, known.hf_prefixes[0] if prefix is None else prefix)
    tensors = {}
    for name, tensor in tiny_model(family, **changes).tensors.items():
        ref = reference_of(names, name)
        values = dequantize(tensor)
        if ref.part is not None:  # each part is stored three times over: only names and shapes matter here
            values = np.concatenate([values] * ref.part[1])
        tensors[ref.name] = Tensor.from_array(values.T if ref.transpose else values)
    return MemoryFiles(config, tensors, "hf", generation or {})


def embedding(model):
    return dequantize(model.weights.tensor("embed.weight"))


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("llama", "model."), ("llama", ""), ("qwen2", "model."), ("gpt2", "transformer."), ("gpt2", ""),
        ("gemma3_text", "model."), ("gemma3_text", "language_model.model."), ("gemma3_text", "model.language_model."),
    ],
)  # fmt: skip
def test_prefixes(family, prefix):
    files = checkpoint(family, prefix)
    model = load_model(files)
    for weight in model.program.weights:
        assert model.weights.tensor(weight.name).shape == weight.shape


def test_a_checkpoint_without_an_embedding_is_refused():
    files = checkpoint("llama", "decoder.")
    with pytest.raises(ModelFileError, match=re.escape("model.embed_tokens.weight")):
        load_model(files)


def test_parts_of_tensors_that_gpt2_need_not_have_are_passed_over():
    files = checkpoint("gpt2")
    mask = Tensor.from_array(np.zeros((1, 1, 4, 4), np.float32))
    extra = {"transformer.h.0.attn.bias": mask, "transformer.h.1.attn.masked_bias": mask}
    load_model(MemoryFiles(files.metadata, {**files.tensors, **extra}, "hf"))


def test_a_tied_checkpoint_may_hold_a_head_and_it_is_not_used():
    files = checkpoint("llama", tie_word_embeddings=True)
    head = Tensor.from_array(np.full((259, 64), 7.0, np.float32))
    model = load_model(MemoryFiles(files.metadata, {**files.tensors, "lm_head.weight": head}, "hf"))
    assert "lm_head.weight" not in {weight.name for weight in model.program.weights}
    assert not np.any(embedding(model) == 7.0)


def test_a_checkpoint_of_old_transformers_may_hold_rotary_frequencies():
    files = checkpoint("llama")
    frequencies = Tensor.from_array(np.zeros(8, np.float32))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies}
    load_model(MemoryFiles(files.metadata, {**files.tensors, **extra}, "hf"))


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(missing):
    files = checkpoint("llama")
    tensors = {name: tensor for name, tensor in files.tensors.items() if name != missing}
    with pytest.raises(ModelFileError, match="lacks") as caught:
        load_model(MemoryFiles(files.metadata, tensors, "hf"))
    assert caught.value.field == missing


def test_a_misshapen_tensor_is_named_with_both_shapes():
    files = checkpoint("llama")
    name = "model.layers.0.self_attn.k_proj.weight"
    wrong = Tensor.from_array(np.zeros((64, 64), np.float32))
    with pytest.raises(ModelFileError, match=re.escape("(64, 64)")) as caught:
        load_model(MemoryFiles(files.metadata, {**files.tensors, name: wrong}, "hf"))
    assert caught.value.field == name
    assert "(32, 64)" in str(caught.value)


def test_a_misshapen_fused_tensor_is_named_with_the_files_shape():
    files = checkpoint("gpt2")
    name = "transformer.h.0.attn.c_attn.weight"
    wrong = Tensor.from_array(np.zeros((192, 64), np.float32))
    with pytest.raises(ModelFileError, match=re.escape("(64, 192)")) as caught:
        load_model(MemoryFiles(files.metadata, {**files.tensors, name: wrong}, "hf"))
    assert caught.value.field == name


@pytest.mark.parametrize("extra", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_norm.weight", "x"])
def test_tensors_that_the_program_does_not_use_are_refused(extra):
    """A model with parts that kvarn would leave out must not run as if they were not there."""
    files = checkpoint("llama")
    tensors = {**files.tensors, extra: Tensor.from_array(np.zeros(16, np.float32))}
    with pytest.raises(UnsupportedModelError, match=re.escape(repr(extra))):
        load_model(MemoryFiles(files.metadata, tensors, "hf"))


def test_end_tokens_of_a_generation_config_come_first():
    files = checkpoint("llama", generation={"eos_token_id": [9, 257, 4]}, eos_token_id=257)
    assert load_model(files).config.eos_token_ids == (9, 257, 4)
    with pytest.raises(ModelFileError, match=r"generation_config\.json: eos_token_id"):
        load_model(checkpoint("llama", generation={"eos_token_id": "stop"}))


def test_weights_are_views_of_the_file(tmp_path):
    with open_model(write_gguf(tmp_path / "m.gguf", tiny_gguf("qwen2", dtype=DType.Q8_0))) as files:
        model = load_model(files)
        for name in ("embed.weight", "layers.1.mlp.down.weight", "norm.weight"):
            tensor = model.weights.tensor(name)
            assert not tensor.data.flags.owndata
            assert not tensor.data.flags.writeable


def weight(files, name):
    """Values of a program's weight."""
    return dequantize(load_model(files).weights.tensor(name))


def test_gemma3_norms_have_one_added_in_checkpoints_only():
    files = checkpoint("gemma3_text")
    stored = dequantize(files.tensors["model.layers.0.self_attn.q_norm.weight"])
    np.testing.assert_array_equal(weight(files, "layers.0.attn.q_norm.weight"), stored + 1)
    files = tiny_gguf("gemma3")
    stored = dequantize(files.tensors["blk.0.attn_q_norm.weight"])
    np.testing.assert_array_equal(weight(files, "layers.0.attn.q_norm.weight"), stored)


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16, DType.Q8_0], ids=lambda d: d.name)
def test_a_fused_matrix_is_cut_by_rows(dtype):
    files = tiny_gguf("gpt2", dtype=dtype)
    stored = dequantize(files.tensors["blk.1.attn_qkv.weight"])
    for index, part in enumerate("qkv"):
        expected = stored[index * 64 : (index + 1) * 64]
        np.testing.assert_array_equal(weight(files, f"layers.1.attn.{part}.weight"), expected)


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16], ids=lambda d: d.name)
def test_a_matrix_stored_by_columns_is_turned_before_it_is_cut(dtype):
    files = checkpoint("gpt2")
    stored = random_tensor(np.random.default_rng(0), dtype, (64, 192), 1.0)
    files = MemoryFiles(files.metadata, {**files.tensors, "transformer.h.0.attn.c_attn.weight": stored}, "hf")
    np.testing.assert_array_equal(weight(files, "layers.0.attn.k.weight"), dequantize(stored)[:, 64:128].T)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "gpt2"])
def test_a_missing_tensor_of_a_gguf_is_named(architecture):
    files = tiny_gguf(architecture)
    for missing in ("output_norm.weight", "blk.1.ffn_down.weight"):
        tensors = {name: tensor for name, tensor in files.tensors.items() if name != missing}
        with pytest.raises(ModelFileError, match="lacks") as caught:
            load_model(MemoryFiles(files.metadata, tensors))
        assert caught.value.field == missing


def test_an_unusual_part_of_a_gguf_is_refused():
    files = tiny_gguf("llama")
    tensors = {**files.tensors, "blk.0.ffn_gate_exps.weight": Tensor.from_array(np.zeros((2, 2), np.float32))}
    with pytest.raises(UnsupportedModelError, match="ffn_gate_exps"):
        load_model(MemoryFiles(files.metadata, tensors))


def test_rope_factors_of_a_gguf_must_fit_the_head():
    files = tiny_gguf("llama")
    for wrong in (np.ones(7, np.float32), np.zeros(8, np.float32), np.full(8, np.nan, np.float32)):
        tensors = {**files.tensors, "rope_freqs.weight": Tensor.from_array(wrong)}
        with pytest.raises(ModelFileError, match=re.escape("rope_freqs.weight")):
            load_model(MemoryFiles(files.metadata, tensors))
