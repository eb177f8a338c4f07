"""Files that are the same have one fingerprint; whatever may have changed them makes another."""

import json
import os

import pytest

from kvarn.testing import write_tiny_gguf
from kvarn.weights import open_model
from kvarn.weights.fingerprint import fingerprint


def write_safetensors(path, value):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"v": value}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))


@pytest.fixture(params=["gguf", "hf"])
def model(request, tmp_path):
    if request.param == "gguf":
        return write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", "a")
    return folder


def weights_of(model):
    return model / "model.safetensors" if model.is_dir() else model


def of(model):
    with open_model(model) as files:
        return fingerprint(files.sources())


def test_the_same_file_has_the_same(model):
    assert of(model) == of(model)


def test_reading_and_moving_change_nothing(model, tmp_path):
    before = of(model)
    weights_of(model).read_bytes()
    assert of(model) == before
    if model.is_dir():
        moved = model.rename(tmp_path / "moved")
        assert of(moved) == before


def test_a_write_a_touch_and_a_copy_make_another(model):
    seen = {of(model)}
    path = weights_of(model)
    with open_model(model) as files:
        sources = files.sources()
        assert all(source.unchanged() for source in sources)
        os.utime(path, ns=(1, 1))
        assert not all(source.unchanged() for source in sources)
    seen.add(of(model))
    data = path.read_bytes()
    other = path.with_name("copy")
    other.write_bytes(data)
    os.utime(other, ns=(1, 1))
    other.replace(path)
    seen.add(of(model))
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    os.utime(path, ns=(1, 1))
    seen.add(of(model))
    assert len(seen) == 4


def test_a_file_that_is_gone_is_not_unchanged(model):
    with open_model(model) as files:
        sources = files.sources()
        weights_of(model).unlink()
        assert not any(source.unchanged() for source in sources)


def test_every_shard_counts(tmp_path):
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_safetensors(folder / "a.safetensors", "a")
    (folder / "b.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    index = {"weight_map": {"w": "a.safetensors", "x": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    before = of(folder)
    os.utime(folder / "b.safetensors", ns=(1, 1))
    assert of(folder) != before
