"""The tiny models that other tests stand on are sane in every family and stored type."""

import numpy as np
import pytest

from kvarn.backends import InputBatch, KvCacheSpec, StepLimits
from kvarn.backends.reference import ReferenceBackend
from kvarn.models import load_model
from kvarn.tensors import DType
from kvarn.tensors.dequantize import dequantize
from kvarn.testing import byte_tokenizer, byte_vocabulary, random_tensor, tiny_gguf, tiny_model, write_tiny_gguf
from kvarn.testing.models import SETTINGS
from kvarn.text import IncrementalDetokenizer, load_tokenizer
from kvarn.weights import open_model


def one_prompt(ids, groups=1):
    return InputBatch.of_one(ids, num_outputs=len(ids), num_groups=groups)


@pytest.mark.parametrize("family", SETTINGS)
def test_logits_are_finite_and_varied(family):
    model = tiny_model(family, seed=3)
    groups = len(model.program.kv_groups)
    executable = ReferenceBackend().load(model.program, model, KvCacheSpec(8 * groups), StepLimits(128, 4, 128))
    logits = executable.execute(one_prompt(range(40), groups=groups))["logits"]
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 100
    assert len(set(logits.argmax(1))) > 5


@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.name)
def test_random_tensors_have_about_the_scale_asked_for(dtype):
    values = dequantize(random_tensor(np.random.default_rng(0), dtype, (64, 512), 0.5))
    assert 0.1 < values.std() < 2.5
    assert abs(values.mean()) < 0.6


def test_a_batch_that_names_what_is_not_there_is_refused():
    model = tiny_model()
    executable = ReferenceBackend().load(model.program, model, KvCacheSpec(2), StepLimits(32, 1, 32))
    good = one_prompt(range(20))
    executable.execute(good)
    for field, value in {
        "token_ids": np.full(20, 259, np.int32),
        "positions": good.positions + 1,
        "slot_mapping": good.slot_mapping[::-1].copy(),
        "block_tables": np.array([[[0, 2]]], np.int32),
        "seq_lens": np.array([33], np.int32),
        "query_start": np.array([0, 19], np.int32),
        "output_rows": np.array([20], np.int32),
    }.items():
        fields = {name: getattr(good, name) for name in InputBatch.__slots__}
        with pytest.raises(ValueError):
            executable.execute(InputBatch(**{**fields, field: value}))
    with pytest.raises(ValueError, match="no buffer 'nothing'"):
        executable.execute(good, ["nothing"])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.Q4_1, DType.Q4_K], ids=lambda d: d.name)
def test_a_written_file_is_the_model_in_memory(tmp_path, architecture, dtype):
    pytest.importorskip("gguf", reason="GGUF files are written with the gguf package")
    settings = {"dtype": dtype, "seed": 4, "tied": False, "embedding_length": 256, "feed_forward_length": 256}
    memory = load_model(tiny_gguf(architecture, **settings))
    with open_model(write_tiny_gguf(tmp_path / "tiny.gguf", architecture, **settings)) as files:
        model = load_model(files)
        assert model.program == memory.program
        assert model.config == memory.config
        assert {files.tensor_info(name)[0] for name in files.tensor_names} == {DType.F32, dtype}
        for weight in model.program.weights:
            got, want = model.weights.tensor(weight.name), memory.weights.tensor(weight.name)
            np.testing.assert_array_equal(got.data, want.data)
        assert load_tokenizer(files).encode("é") == [0xC3, 0xA9]


def test_the_byte_tokenizer_is_a_tokenizer():
    tokenizer = byte_tokenizer()
    text = "héllo ▁ <bos> 🙂\n"
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<bos>a", parse_special=True) == [tokenizer.bos_token_id, ord("a")]
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (259, 256, (257,))
    streamed = IncrementalDetokenizer(tokenizer)
    assert "".join(streamed.append(i) for i in ids) + streamed.finish() == text
    turns = [{"role": "user", "content": "hi"}]
    assert bytes(tokenizer.encode_chat(turns)).decode() == "user: hi\nassistant:"
    assert byte_tokenizer(300).vocab_size == 300
    with pytest.raises(ValueError, match="at least 259"):
        byte_vocabulary(100)
