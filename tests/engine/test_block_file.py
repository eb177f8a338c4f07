"""The file of the second tier: what was saved is loaded to the byte, or not at all."""

import os
import subprocess
import sys

import numpy as np
import pytest

from kvarn.errors import ConfigError
from kvarn.runner import BlockFile

BYTES = 1000
ROOM = 3 * BYTES + 3 * 4096
NAMES = [bytes([n]) * 32 for n in range(1, 5)]


def content(seed):
    return np.random.default_rng(seed).integers(0, 256, BYTES).astype(np.uint8)


def fill(data):
    def read(out):
        out[:] = data

    return read


def loaded(file, slot, name):
    got = []
    return got[0] if file.load(slot, name, got.append) else None


@pytest.fixture
def path(tmp_path):
    return tmp_path / "kv" / "blocks.kv"


@pytest.fixture
def file(path):
    made = BlockFile(path, ROOM, BYTES, "model")
    yield made
    made.close()


def test_a_slot_gives_back_what_was_saved(file):
    for slot in range(3):
        file.save(slot, NAMES[slot], fill(content(slot)))
    for slot in range(3):
        assert np.array_equal(loaded(file, slot, NAMES[slot]), content(slot))
    assert loaded(file, 0, NAMES[1]) is None


def test_it_has_its_size_from_the_start_and_is_for_its_owner_only(file, path):
    assert file.num_slots >= 3
    assert path.stat().st_size <= ROOM
    assert path.stat().st_blocks * 512 >= path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_next_process_finds_what_was_saved(file, path):
    for slot, name in ((2, NAMES[0]), (0, NAMES[1])):
        file.save(slot, name, fill(content(slot)))
    file.close()
    again = BlockFile(path, ROOM, BYTES, "model")
    assert list(again.present().items()) == [(NAMES[0], 2), (NAMES[1], 0)]
    assert np.array_equal(loaded(again, 2, NAMES[0]), content(2))
    again.close()


@pytest.mark.parametrize(("room", "size", "identity"), [(ROOM + 4096, BYTES, "model"), (ROOM, BYTES, "other")])
def test_a_file_of_another_model_or_size_is_made_anew(file, path, room, size, identity):
    file.save(0, NAMES[0], fill(content(0)))
    file.close()
    again = BlockFile(path, room, size, identity)
    assert not again.present()
    again.close()


@pytest.mark.parametrize("offset", [5, 4096 + 3, 4096 + 40, -BYTES + 7])
def test_a_changed_byte_anywhere_loses_the_block_and_nothing_else(file, path, offset):
    for slot in range(file.num_slots):
        file.save(slot, NAMES[slot % 4], fill(content(slot)))
    last = file.num_slots - 1
    file.close()
    with path.open("r+b") as raw:
        raw.seek(offset, os.SEEK_SET if offset > 0 else os.SEEK_END)
        byte = raw.read(1)
        raw.seek(-1, os.SEEK_CUR)
        raw.write(bytes([byte[0] ^ 1]))
    again = BlockFile(path, ROOM, BYTES, "model")
    good = [slot for slot in range(last + 1) if loaded(again, slot, NAMES[slot % 4]) is not None]
    assert len(good) == (0 if offset == 5 else last)
    for slot in good:
        assert np.array_equal(loaded(again, slot, NAMES[slot % 4]), content(slot))
    again.close()


def test_a_save_that_fails_leaves_no_half_block(file):
    file.save(0, NAMES[0], fill(content(0)))

    def broken(out):
        out[: BYTES // 2] = 0
        raise RuntimeError("the executable is closed")

    with pytest.raises(RuntimeError):
        file.save(0, NAMES[1], broken)
    assert loaded(file, 0, NAMES[0]) is None
    assert loaded(file, 0, NAMES[1]) is None


def test_one_process_at_a_time(file, path):
    code = (
        "import sys, pathlib; from kvarn.runner import BlockFile\n"
        f"BlockFile(pathlib.Path(sys.argv[1]), {ROOM}, {BYTES}, 'model')"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "is in use by another process; give each its own folder" in ended.stderr
    file.save(0, NAMES[0], fill(content(0)))
    assert loaded(file, 0, NAMES[0]) is not None


def test_no_room_for_a_block_and_no_folder_are_told(tmp_path):
    with pytest.raises(ConfigError, match="kv_offload_bytes must be at least 9192"):
        BlockFile(tmp_path / "a", 5000, BYTES, "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"kv_offload_dir: cannot open .*: (Not a directory|File exists)"):
        BlockFile(tmp_path / "file" / "b", ROOM, BYTES, "model")
