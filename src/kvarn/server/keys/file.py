"""The keys file: TOML, or JSON where its name ends in .json. Every mistake is named, and no key lost in writing.

    version = 1
    salt = "…"                     # 64 hex digits, made with the file

    [keys.ann]
    digest = "…"                   # HMAC-SHA256 of the key under the salt, in hex; `kvarn keys add` makes it
    tenant = "research"            # this and all that follows may be left out: see `Key`
    priority = 0
    requests_per_minute = 600
    tokens_per_minute = 200000
    max_concurrency = 16
    cache_salt = "…"
    keep_alive = true
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from kvarn.errors import ConfigError
from kvarn.server.keys.records import DIGEST_BYTES, MAX_KEYS, SALT_BYTES, Key, KeySet, digest, new_key, new_salt

VERSION = 1
MAX_FILE_BYTES = 4 << 20
TEXTS, NUMBERS = ("tenant", "cache_salt"), ("priority", "requests_per_minute", "tokens_per_minute", "max_concurrency")
RIGHTS = ("keep_alive",)
_HEX = re.compile(r"(?:[0-9a-f]{2})+")


def read_keys(path: Path) -> KeySet:
    """The keys of a file. Raises ConfigError naming the file and what is wrong in it."""
    return parse_keys(_read(path), path)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--keys-file: cannot read {path}: {error.strerror or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: a keys file has at most {MAX_FILE_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error


def parse_keys(text: str, path: Path) -> KeySet:
    """The keys of a file's text. Raises ConfigError. path: says whether it is JSON, and what errors name."""
    try:
        return _key_set(_value(text, path.suffix.lower() == ".json"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _value(text: str, is_json: bool) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once) if is_json else tomllib.loads(text)
    except RecursionError:
        raise ConfigError("it is nested too deep") from None
    except ValueError as error:
        raise ConfigError(f"it is no {'JSON' if is_json else 'TOML'}: {str(error)[:200]}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name in found if sum(name == other for other, _ in pairs) > 1)
        raise ConfigError(f"{twice[:80]!r} is there twice")
    return found


def _key_set(value: Any) -> KeySet:
    fields = _fields(value, "the file", {"version", "salt", "keys"})
    version = fields.get("version", VERSION)
    if version != VERSION or isinstance(version, bool):
        raise ConfigError(f"version must be {VERSION}, not {str(version)[:40]}")
    salt = _bytes("salt", fields.get("salt"), SALT_BYTES)
    keys = fields.get("keys", {})
    if not isinstance(keys, dict):
        raise ConfigError("keys must be a table of keys by name")
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"there may be at most {MAX_KEYS} keys, not {len(keys)}")
    return KeySet(salt, tuple(_key(name, fields) for name, fields in keys.items()))


def _fields(value: Any, what: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{what} must be a table")
    for name in value:
        if name not in known:
            raise ConfigError(f"{what} has an unknown field {name[:80]!r}; there are {', '.join(sorted(known))}")
    return value


def _key(name: str, value: Any) -> Key:
    what = f"keys.{name[:80]}"
    fields = _fields(value, what, {"digest", *TEXTS, *NUMBERS, *RIGHTS})
    for field in fields.keys() & {*TEXTS}:
        if not isinstance(fields[field], str):
            raise ConfigError(f"{what}.{field} must be a text")
    for field in fields.keys() & {*NUMBERS}:
        if type(fields[field]) is not int:
            raise ConfigError(f"{what}.{field} must be a whole number")
    for field in fields.keys() & {*RIGHTS}:
        if type(fields[field]) is not bool:
            raise ConfigError(f"{what}.{field} must be true or false")
    given = {field: fields[field] for field in (*TEXTS, *NUMBERS, *RIGHTS) if field in fields}
    try:
        return Key(name, _bytes("digest", fields.get("digest"), DIGEST_BYTES), **given)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None


def _bytes(field: str, value: Any, size: int) -> bytes:
    if not isinstance(value, str) or len(value) != 2 * size or not _HEX.fullmatch(value):
        raise ConfigError(f"{field} must be {2 * size} hex digits; `kvarn keys add` makes it")
    return bytes.fromhex(value)


def add_key(path: Path, name: str, **limits: str | int) -> str:
    """Adds a key to the file, which is made where it is not there, and returns it: nothing keeps it.

    limits: fields of `Key`. Raises ConfigError for a name that is taken, and for a file that is wrong before or after.
    """
    text = _read(path) if path.exists() else _empty(path)
    before = parse_keys(text, path)
    if any(key.name == name for key in before.keys):
        raise ConfigError(f"{path} has a key {name!r} already; `kvarn keys remove {name}` takes it out")
    secret = new_key()
    key = Key(name, digest(before.salt, secret), **limits)  # type: ignore[arg-type]
    fields = {"digest": key.digest.hex(), **limits}
    if path.suffix.lower() == ".json":
        value = json.loads(text)
        value.setdefault("keys", {})[name] = fields
        text = json.dumps(value, indent=2) + "\n"
    else:
        text += "".join(["" if text.endswith("\n") else "\n", f"\n[keys.{name}]\n", *map(_line, fields.items())])
    _write(path, text, KeySet(before.salt, (*before.keys, key)))
    return secret


def remove_key(path: Path, name: str) -> None:
    """Takes a key out of the file; comments and the order of the others stay. Raises ConfigError."""
    text = _read(path)
    before = parse_keys(text, path)
    if all(key.name != name for key in before.keys):
        known = ", ".join(key.name for key in before.keys) or "none"
        raise ConfigError(f"{path} has no key {name!r}; it has {known}")
    if path.suffix.lower() == ".json":
        value = json.loads(text)
        del value["keys"][name]
        text = json.dumps(value, indent=2) + "\n"
    else:
        text = _without_table(text, name)
    _write(path, text, KeySet(before.salt, tuple(key for key in before.keys if key.name != name)))


def _empty(path: Path) -> str:
    salt = new_salt().hex()
    if path.suffix.lower() == ".json":
        return json.dumps({"version": VERSION, "salt": salt, "keys": {}})
    comment = "# Keys of `kvarn serve`, made by `kvarn keys`. A running server sees changes within a second."
    return f'{comment}\nversion = {VERSION}\nsalt = "{salt}"\n'


def _line(field: tuple[str, str | int]) -> str:
    # Texts are printable, and those JSON writes as TOML reads them.
    return f"{field[0]} = {json.dumps(field[1], ensure_ascii=False)}\n"


def _without_table(text: str, name: str) -> str:
    header = re.compile(rf"\s*\[\s*keys\s*\.\s*[\"']?{re.escape(name)}[\"']?\s*\]\s*(#.*)?")
    kept, inside = [], False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith("["):
            inside = header.fullmatch(line.rstrip("\r\n")) is not None
        if not inside:
            kept.append(line)
    return "".join(kept).rstrip("\n") + "\n"


def _write(path: Path, text: str, wanted: KeySet) -> None:
    """Puts the text into the file at once, so that nobody reads half of it. Raises ConfigError."""
    if parse_keys(text, path) != wanted:
        raise ConfigError(f"{path} is written in a way that `kvarn keys` cannot edit; change it by hand")
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.resolve().parent, delete=False, encoding="utf-8") as file:
            temporary = file.name
            file.write(text)
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o777)
        os.replace(temporary, path.resolve())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
