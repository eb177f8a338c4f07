"""Hugging Face folders: sharded or not, checked against their files, nothing read outside them."""

import json
import struct

import numpy as np
import pytest

from kvarn.errors import KvarnError, ModelFileError, UnsupportedModelError
from kvarn.tensors import DType
from kvarn.weights import open_model


def shard(tensors, header=None) -> bytes:
    """A .safetensors file of {name: (dtype, shape, bytes)}."""
    entries, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(entries if header is None else header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def test_bfloat16_comes_as_its_raw_bytes(folder):
    raw = np.arange(12, dtype=np.uint16).tobytes()
    (folder / "model.safetensors").write_bytes(shard({"w": ("BF16", [3, 4], raw)}))
    with open_model(folder) as files:
        assert files.tensor_info("w") == (DType.BF16, (3, 4))
        assert files.tensor("w").data.tobytes() == raw


def test_shards_make_one_model(folder):
    for i in (1, 2):
        values = np.full(2, i, np.float32).tobytes()
        (folder / f"m-{i}.safetensors").write_bytes(shard({f"w{i}": ("F32", [2], values)}))
    index = {"weight_map": {"w1": "m-1.safetensors", "w2": "m-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_model(folder) as files:
        assert sorted(files.tensor_names) == ["w1", "w2"]
        assert files.tensor("w2").data.view(np.float32).tolist() == [2, 2]


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "model.bin"])
def test_an_index_cannot_name_files_elsewhere(folder, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ModelFileError, match="not a shard of this folder"):
        open_model(folder)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<Q", 2**60),
        struct.pack("<Q", 5) + b"{nope",
        shard({}, header=[1]),
        shard({}, header={"w": {"dtype": "F32"}}),
        shard({}, header={"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
        shard({"w": ("F32", [5], bytes(16))}),
        shard({"w": ("F32", [-1], bytes(16))}),
        shard({"w": ("F32", [True, 4], bytes(16))}),
        shard({}, header={"w": {"dtype": "F32", "shape": [0], "data_offsets": [8, 0]}}),
    ],
)
def test_damaged_headers_are_refused(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelFileError):
        open_model(folder)


def test_other_types_are_named(folder):
    (folder / "model.safetensors").write_bytes(shard({"w": ("F8_E4M3", [4], bytes(4))}))
    with open_model(folder) as files, pytest.raises(UnsupportedModelError, match="F8_E4M3"):
        files.tensor("w")


def test_a_folder_of_pickles_says_what_to_do(folder):
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelFileError, match="convert it to safetensors"):
        open_model(folder)


def test_a_folder_without_config_or_with_a_broken_one(tmp_path):
    with pytest.raises(ModelFileError, match=r"config\.json"):
        open_model(tmp_path)
    for broken in ("{", "[]", "[" * 100_000):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(KvarnError):
            open_model(tmp_path)
