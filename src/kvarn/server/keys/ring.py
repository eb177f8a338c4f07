"""`KeyRing`: all keys that are good, with their accounts; the keys file is read again where it has changed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvarn.errors import ConfigError
from kvarn.server.keys.account import Account, OpenAccount
from kvarn.server.keys.file import read_keys
from kvarn.server.keys.records import MAX_KEY_CHARS, Key, KeySet, plain_keys

logger = logging.getLogger("kvarn.server")
CHECK_SECONDS = 1.0
"""Between two looks at the file."""


class KeyRing:
    """Keys given as they are, and those of a file. Used by one thread."""

    def __init__(
        self,
        api_keys: Sequence[str] = (),
        path: Path | None = None,
        *,
        with_priorities: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """with_priorities: whether the scheduler looks at priorities; where not, a key that has one is a mistake.

        Raises ConfigError for keys that are none, and a file that is wrong.
        """
        self._with_priorities = with_priorities
        self._clock = clock
        self._plain = plain_keys(tuple(api_keys))
        self._path = path
        self._signature = self._look()
        self._filed = KeySet(b"") if path is None else self._read(path)
        self._accounts: dict[tuple[str, bool], Account] = {}
        self._next_look = clock() + CHECK_SECONDS
        self.open = OpenAccount()
        self._open_accounts()

    def __bool__(self) -> bool:
        """Whether a key is needed. A file without keys lets nobody in."""
        return bool(self._plain.keys) or self._path is not None

    def find(self, key: str) -> Account | None:
        """Whose key it is; None for one that is not good. Takes the same time whichever it is."""
        self._refresh()
        if len(key) > MAX_KEY_CHARS:
            key = ""  # which is none
        plain, filed = self._plain.find(key), self._filed.find(key)
        found = plain or filed
        return None if found is None else self._accounts[found.name, found is filed]

    def _read(self, path: Path) -> KeySet:
        keys = read_keys(path)
        for key in keys.keys:
            if key.priority and not self._with_priorities:
                must = f"must be 0, not {key.priority}: only --policy priority looks at it"
                raise ConfigError(f"{path}: keys.{key.name}.priority {must}")
        return keys

    def _look(self) -> tuple[int, int, int] | None:
        """What changes with the file; None where it is not there."""
        if self._path is None:
            return None
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _refresh(self) -> None:
        """Takes the file's keys where it has changed, and keeps those it has where the new ones are wrong."""
        now = self._clock()
        if self._path is None or now < self._next_look:
            return
        self._next_look = now + CHECK_SECONDS
        signature = self._look()
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._filed = self._read(self._path)
        except ConfigError as error:
            logger.error("the keys file was not taken, the keys before it stay good: %s", error)
            return
        self._open_accounts()
        logger.info("the keys file was read again: %d keys", len(self._filed.keys))

    def _open_accounts(self) -> None:
        """Accounts of keys that stay go on under their new limits; those of others end with their last requests."""
        accounts: dict[tuple[str, bool], Account] = {}
        for keys, filed in ((self._plain.keys, False), (self._filed.keys, True)):
            for key in keys:
                accounts[key.name, filed] = self._account(key, filed)
        self._accounts = accounts

    def _account(self, key: Key, filed: bool) -> Account:
        account = self._accounts.get((key.name, filed))
        if account is None:
            return Account(key, self._clock)
        account.revise(key)
        return account
