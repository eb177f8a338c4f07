"""The folder of packed weights: what is removed first, and how it is listed."""

import json
import os

import pytest
from typer.testing import CliRunner

from kvarn.cli.app import app
from kvarn.weights import packed_cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KVARN_HOME", str(tmp_path))
    folder = tmp_path / "packed"
    folder.mkdir()
    for age, name in enumerate(("new", "middle", "old")):
        path = folder / f"{name}-0123456789ab.packed"
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    return folder


def names():
    return [model.name for model in packed_cache.packed_models()]


def test_the_least_recently_used_go_first(folder):
    fourth = folder / "fourth-0123456789ab.packed"
    assert packed_cache.make_room(fourth, 50, 350)
    assert names() == ["new", "middle", "old"]
    assert packed_cache.make_room(fourth, 51, 350)
    assert names() == ["new", "middle"]
    assert packed_cache.make_room(fourth, 350, 350)
    assert names() == []


def test_a_file_makes_room_for_itself(folder):
    assert packed_cache.make_room(folder / "old-0123456789ab.packed", 100, 300)
    assert names() == ["new", "middle", "old"]


def test_what_can_never_fit_removes_nothing(folder):
    assert not packed_cache.make_room(folder / "huge.packed", 301, 300)
    assert len(names()) == 3


def test_left_over_files_are_swept(folder):
    old, young = folder / "a.tmp", folder / "b.tmp"
    old.touch()
    young.touch()
    os.utime(old, (1e9, 1e9))
    packed_cache.make_room(folder / "x.packed", 1, 1000)
    assert not old.exists()
    assert young.exists()


def test_a_model_has_one_place(tmp_path, folder):
    model = tmp_path / "a model.v2.gguf"
    model.touch()
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    path = packed_cache.packed_path(model)
    assert path.parent == folder
    assert path.name.startswith("a_model.v2-")
    assert packed_cache.packed_path(link) == path
    assert packed_cache.packed_path(tmp_path / "other" / model.name) != path


def run(*arguments):
    result = CliRunner().invoke(app, ["models", *arguments])
    return result.exit_code, result.output


def test_models_lists_and_removes_them(folder):
    code, output = run()
    assert code == 0
    assert [line.split()[0] for line in output.splitlines() if "2001-09-09" in line] == ["new", "middle", "old"]
    listed = json.loads(run("--packed", "--json")[1])
    assert [(model["name"], model["bytes"]) for model in listed] == [("new", 100), ("middle", 100), ("old", 100)]
    assert run("--remove-packed", "middle") == (0, "removed middle (0.0 MB)\n")
    assert names() == ["new", "old"]
    code, output = run("--remove-packed", "nothing")
    assert code == 2
    assert "new, old" in output
    assert run("--remove-packed", "all")[0] == 0
    assert names() == []
