"""Files of heads: what is written is read, and nothing else."""

import dataclasses
import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_heads import random_heads
from safetensors.numpy import load, save
from tiny_engine import shared_model, tiny_engine

from kvarn.config import SpeculativeConfig
from kvarn.errors import ConfigError, ModelFileError
from kvarn.models import content_key
from kvarn.spec import open_heads
from kvarn.spec.heads import KINDS, read_heads, save_heads
from kvarn.tensors import Tensor
from kvarn.testing import tiny_model

TARGET = content_key(shared_model("llama", 0).program, shared_model("llama", 0))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "heads.safetensors"


def written(file, kind="medusa"):
    heads = random_heads(shared_model("llama", 0), kind)
    save_heads(file, heads)
    return heads


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(file, kind):
    heads, got = written(file, kind), read_heads(file, kind, TARGET)
    assert (got.kind, got.target, got.shape, got.training) == (kind, TARGET, heads.shape, heads.training)
    np.testing.assert_array_equal(got.draft_ids, heads.draft_ids)
    assert got.tensors.keys() == heads.tensors.keys()
    for name, values in heads.tensors.items():
        np.testing.assert_array_equal(got.tensors[name], values)
    assert list(file.parent.iterdir()) == [file], "nothing else is left"


def rewrite(file, *, metadata=None, **tensors):
    """The file with some of its metadata and tensors changed; None: left out."""
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    said = {**header["__metadata__"], **(metadata or {})}
    arrays = {**load(content), **{name.replace("__", "."): value for name, value in tensors.items()}}
    file.write_bytes(
        save({k: v for k, v in arrays.items() if v is not None}, {k: v for k, v in said.items() if v is not None})
    )


def changed_shape(file, **values):
    heads = random_heads(shared_model("llama", 0), "medusa")
    return {"shape": json.dumps({**dataclasses.asdict(heads.shape), **values})}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"format": None}, "format: .*not a file of heads"),
        ({"version": "2"}, "version: .*this kvarn reads version 1"),
        ({"kind": "eagle"}, "kind: .*method=medusa needs heads of that kind"),
        ({"target": "f" * 64}, "target: trained for another model"),
        ({"target": None}, "target: trained for another model"),
        ({"shape": "[]"}, "shape: must be a JSON object"),
        ({"shape": "{" * 5000}, "shape: must be a JSON object"),
        ({"shape": "{}"}, "shape: must have"),
        ({"training": "{}"}, "training: acceptance must be a list"),
        ({"training": '{"acceptance": [2.0], "data_sha256": "", "tokens": 1, "steps": 1}'}, "acceptance must be"),
        ({"training": '{"acceptance": [], "data_sha256": "", "tokens": "x", "steps": 1}'}, "must have data_sha256"),
    ],
)
def test_wrong_metadata_is_named(file, metadata, words):
    written(file)
    rewrite(file, metadata=metadata)
    with pytest.raises(ModelFileError, match=words):
        read_heads(file, "medusa", TARGET)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_heads": 17}, "shape.num_heads: must be between 1 and 16"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": True}, "num_heads"),
        ({"num_heads": 2.0}, "num_heads"),
        ({"draft_vocab": 260}, "shape.draft_vocab: must be between 1 and 259"),
        ({"hidden_size": 1 << 60}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"norm_eps": "x"}, "norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"hidden_size": 32}, "heads.0.block.weight: has shape"),
        ({"num_heads": 2}, "heads.2.block.bias: heads have no such tensor"),
        ({"num_heads": 4}, "heads.3.block.bias: the file lacks"),
    ],
)
def test_sizes_that_are_wrong_or_do_not_agree_are_named(file, values, words):
    written(file)
    rewrite(file, metadata=changed_shape(file, **values))
    with pytest.raises(ModelFileError, match=words):
        read_heads(file, "medusa", TARGET)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"draft_ids": None}, "draft_ids: the file lacks"),
        ({"draft_ids": np.arange(100, dtype=np.int64)}, "draft_ids: has type I64"),
        ({"draft_ids": np.arange(99, dtype=np.int32)}, "draft_ids: has shape"),
        ({"draft_ids": np.arange(100, dtype=np.int32)[::-1].copy()}, "draft_ids: must be different tokens"),
        ({"draft_ids": np.arange(160, 260, dtype=np.int32)}, "draft_ids: must be different tokens of 259"),
        ({"draft_ids": np.zeros(100, np.int32)}, "draft_ids: must be different tokens"),
        ({"draft_ids": np.r_[5, -(2**31) + 2 + np.arange(99)].astype(np.int32)}, "draft_ids: must be different"),
        ({"heads__0__block__bias": np.full(64, np.nan, np.float32)}, "bias: holds values that are not finite"),
        ({"heads__1__lm_head__weight": np.full((100, 64), np.inf, np.float16)}, "not finite"),
        ({"heads__1__lm_head__weight": np.zeros((100, 64), np.float64)}, "has type F64"),
        ({"heads__1__lm_head__weight": np.zeros((64, 100), np.float16)}, "has shape"),
        ({"more": np.zeros(3, np.float32)}, "more: heads have no such tensor"),
    ],
)
def test_wrong_tensors_are_named(file, tensors, words):
    written(file)
    rewrite(file, **tensors)
    with pytest.raises(ModelFileError, match=words):
        read_heads(file, "medusa", TARGET)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_read_or_refused(file, data):
    written(file, kind := data.draw(st.sampled_from(KINDS)))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.one_of(st.integers(0, 1500), st.integers(0, len(content) - 1)))
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])
    with suppress(ModelFileError):
        heads = read_heads(file, kind, TARGET)
        assert heads.draft_ids.min() >= 0 and heads.draft_ids.max() < 259


def test_another_models_heads_are_refused_at_start(file):
    written(file)
    config = SpeculativeConfig("medusa", heads=str(file))
    tiny_engine(speculative=config).core.close()
    with pytest.raises(ModelFileError, match="target: trained for another model"):
        tiny_engine(speculative=config, seed=1)
    with pytest.raises(ModelFileError, match=r"kind: .*method=eagle"):
        tiny_engine(speculative=SpeculativeConfig("eagle", heads=str(file)))
    with pytest.raises(ConfigError, match="k must be at most 3, the heads that were trained, not 4"):
        tiny_engine(speculative=SpeculativeConfig("medusa", k=4, heads=str(file)))
    bigger = tiny_model("llama", vocab_size=300)
    with pytest.raises(ModelFileError, match="trained for a model of other sizes"):
        open_heads(config, bigger.program)
    with pytest.raises(ModelFileError, match="cannot be read"):
        tiny_engine(speculative=SpeculativeConfig("medusa", heads=str(file) + "x"))


def test_settings_of_heads_are_checked():
    with pytest.raises(ConfigError, match="heads must be the file of heads that method=medusa needs, not ''"):
        SpeculativeConfig("medusa")
    with pytest.raises(ConfigError, match="heads must be left out for method=ngram"):
        SpeculativeConfig("ngram", heads="x")


def test_a_models_key_is_that_of_its_weights():
    model = tiny_model("llama")
    assert content_key(model.program, model) == TARGET == content_key(tiny_model("llama").program, tiny_model("llama"))
    keys = {TARGET}
    for other in (tiny_model("llama", seed=1), tiny_model("qwen2"), tiny_model("llama", vocab_size=300)):
        keys.add(content_key(other.program, other))
    values = np.frombuffer(model.tensors["norm.weight"].data.tobytes(), np.float32).copy()
    values[7] += 1
    model.tensors["norm.weight"] = Tensor.from_array(values)
    keys.add(content_key(model.program, model))
    assert len(keys) == 5
