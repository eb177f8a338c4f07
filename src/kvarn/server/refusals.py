"""What was refused because a limit was reached: which limit an error's message names, and how often each was."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import fields

from kvarn.config import GrammarConfig
from kvarn.server.limits import ServerLimits

KEY_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrency")
"""Those of a key; see `kvarn.server.keys`."""
ENGINE_LIMITS = ("max_model_len", "max_num_queued_requests", "max_num_queued_tokens", "ttft_slo_ms")
_NAME = re.compile(r"\((?:--)?([a-z][a-z_-]{2,40})\)")


def limit_names() -> list[str]:
    """The limits of a server, its keys and its engine."""
    grammar = [each.name for each in fields(GrammarConfig) if each.name.startswith("max_")]
    return [*ServerLimits.names(), *KEY_LIMITS, *ENGINE_LIMITS, *grammar]


def named_limit(message: str, known: Collection[str]) -> str | None:
    """The limit that a message names, as all do that refuse because of one: in parentheses, as the setting or flag.

    known: names that count. The message may repeat what a client sent, so others are not to become labels.
    """
    names = (name.replace("-", "_") for name in reversed(_NAME.findall(message)))
    return next((name for name in names if name in known), None)


class Refusals:
    """Requests refused or broken off, by limit. Any thread may call."""

    def __init__(self, limits: Iterable[str]) -> None:
        """limits: the names of all that there are, so that each is in the metrics from the start, at 0."""
        self._counts = Counter(dict.fromkeys(limits, 0))
        self._lock = threading.Lock()

    def count(self, message: str) -> None:
        """Books an error by the limit that its message names; nothing where it names none."""
        limit = named_limit(message, self._counts)
        if limit is not None:
            with self._lock:
                self._counts[limit] += 1

    def counts(self) -> dict[str, int]:
        """A snapshot, in order."""
        with self._lock:
            return dict(self._counts)
