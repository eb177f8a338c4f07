"""`Key`: what the server knows of an API key. The key itself is not among it."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from kvarn.errors import ConfigError
from kvarn.request import MAX_CACHE_SALT_CHARS

MAX_KEYS = 1024
MAX_KEY_CHARS = 512
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""A name as it may stand in logs, and bare in TOML."""
MOST_PER_MINUTE = 10**12
PRIORITIES = 2**31
"""Priorities are at least the negative of this, and below it, as the scheduler has them."""
SALT_BYTES = DIGEST_BYTES = 32


def new_key() -> str:
    """A fresh key of 256 random bits."""
    return f"kvarn-{secrets.token_urlsafe(32)}"


def new_salt() -> bytes:
    """A fresh salt for a set of keys."""
    return secrets.token_bytes(SALT_BYTES)


def digest(salt: bytes, key: str) -> bytes:
    """HMAC-SHA256 of a key under its set's salt.

    A fast hash is right here, and a slow one (scrypt, argon2) would be wrong: those make up for passwords that can be
    guessed. Keys are made by `new_key`, with more random bits than anybody can try, and are hashed on every request, so
    that a slow hash would only let strangers keep the server busy with wrong keys. The salt makes digests of two files
    differ.
    """
    return hmac.new(salt, key.encode("utf-8", "surrogateescape"), hashlib.sha256).digest()


@dataclass(frozen=True, slots=True)
class Key:
    """One key and what it allows. None: no such limit. Raises ConfigError naming the field."""

    name: str
    """In logs and tables."""
    digest: bytes
    """See `digest`; under the salt of the set."""
    tenant: str = ""
    """Whom fair shares and cached prefixes belong to: keys of one tenant share both. Unless given, the name."""
    cache_salt: str = ""
    """That of requests without one: keys of one tenant with different salts share no cached prefixes."""
    priority: int = 0
    """Of requests that do not say, and the smallest (most urgent) that may be asked for."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers together."""
    max_concurrency: int | None = None
    """Requests at the same time."""
    keep_alive: bool = False
    """Whether its requests may say how long their model stays in memory, for others too: 0 unloads it."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"name must be 1 to 64 letters, digits, - or _, not {self.name[:80]!r}")
        object.__setattr__(self, "tenant", self.tenant or self.name)
        _check_text("tenant", self.tenant, 64)
        _check_text("cache_salt", self.cache_salt, MAX_CACHE_SALT_CHARS)
        if not -PRIORITIES <= self.priority < PRIORITIES:
            raise ConfigError(f"priority must be between {-PRIORITIES} and {PRIORITIES - 1}, not {self.priority}")
        for name in ("requests_per_minute", "tokens_per_minute", "max_concurrency"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST_PER_MINUTE:
                raise ConfigError(f"{name} must be between 1 and {MOST_PER_MINUTE}, not {value}")


def _check_text(name: str, text: str, most: int) -> None:
    if len(text) > most or not text.isprintable():
        raise ConfigError(f"{name} must be at most {most} printable characters, not {text[:80]!r}")


@dataclass(frozen=True, slots=True)
class KeySet:
    """Keys under one salt. Raises ConfigError for too many, or two that are alike."""

    salt: bytes
    keys: tuple[Key, ...] = ()

    def __post_init__(self) -> None:
        if len(self.keys) > MAX_KEYS:
            raise ConfigError(f"there may be at most {MAX_KEYS} keys, not {len(self.keys)}")
        by_digest: dict[bytes, str] = {}
        for key in self.keys:
            other = by_digest.setdefault(key.digest, key.name)
            if other != key.name:
                raise ConfigError(f"{other} and {key.name} are the same key")

    def find(self, key: str) -> Key | None:
        """Whose key it is; None for one that is not good. Takes the same time whichever it is."""
        given, found = digest(self.salt, key), None
        for each in self.keys:
            if hmac.compare_digest(each.digest, given):
                found = each
        return found


def plain_keys(keys: tuple[str, ...]) -> KeySet:
    """Keys that are given as they are (`--api-key`): no limits, all rights, each a tenant.

    The tenant is named by a digest of the key, so that it is the same when the server is started again with its keys in
    another order. Raises ConfigError for a key that is empty, too long, not printable ASCII, or given twice; never
    shows one.
    """
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"api_key: there may be at most {MAX_KEYS} keys, not {len(keys)}")
    salt, made = new_salt(), []
    for number, key in enumerate(keys, 1):
        if not 1 <= len(key) <= MAX_KEY_CHARS or not (key.isascii() and key.isprintable()) or key != key.strip():
            must = f"1 to {MAX_KEY_CHARS} printable ASCII characters, no space first or last"
            raise ConfigError(f"api_key number {number} must be {must}")
        if key in keys[: number - 1]:
            raise ConfigError(f"api_key number {number} is given twice")
        tenant = hmac.new(key.encode(), b"kvarn tenant", hashlib.sha256).digest()[:8].hex()
        made.append(Key(f"api-key-{number}", digest(salt, key), tenant=tenant, keep_alive=True))
    return KeySet(salt, tuple(made))
