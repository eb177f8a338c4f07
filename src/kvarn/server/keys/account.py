"""`Account`: what a key has used, held against its limits; `Visit`: one HTTP request of it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from kvarn.server.errors import ApiError
from kvarn.server.keys.bucket import Taken, TokenBucket
from kvarn.server.keys.records import Key

MAX_RETRY_SECONDS = 3600


class Account:
    """Of one key. Stays when the key's limits change. Any thread may call."""

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._running = 0
        self._requests: TokenBucket | None = None
        self._tokens: TokenBucket | None = None
        self.key = key
        self.revise(key)

    def revise(self, key: Key) -> None:
        """Other limits from now on."""
        with self._lock:
            self.key = key
            self._requests = self._retuned(self._requests, key.requests_per_minute)
            self._tokens = self._retuned(self._tokens, key.tokens_per_minute)

    def _retuned(self, bucket: TokenBucket | None, per_minute: int | None) -> TokenBucket | None:
        if bucket is None or per_minute is None:
            return None if per_minute is None else TokenBucket(per_minute, self._clock)
        if bucket.capacity != per_minute:
            bucket.retune(per_minute)
        return bucket

    def begin(self, *, counted: bool = True) -> Visit:
        """Lets a request in. Raises ApiError 429, and then it costs nothing.

        counted: whether it counts as one, in the rate and in the concurrency.
        """
        if not counted:
            return Visit(self, counted=False)
        with self._lock:
            most = self.key.max_concurrency
            if most is not None and self._running >= most:
                says = f"{most} requests of this key are being answered, its limit (max_concurrency)"
                raise _too_many(says, 1.0)
            if self._requests is not None and self._requests.take(1) is None:
                says = f"this key may make {self._requests.capacity:.0f} requests a minute (requests_per_minute)"
                raise _too_many(says, self._requests.seconds_until(1))
            self._running += 1
        return Visit(self, counted=True)

    @property
    def name(self) -> str:
        """Of the key, for logs."""
        return self.key.name

    @property
    def tenant(self) -> str:
        """Whose requests these are."""
        return self.key.tenant

    def reserve(self, tokens: int, guessed: int = 0) -> Taken | None:
        """Takes what a request may cost; None where the key has no such limit. Raises ApiError 429.

        And 400 for one that costs more than the key has in a minute: that never gets in. guessed: tokens that it may
        cost beside, by a guess that is no reason to refuse it for ever.
        """
        with self._lock:
            if self._tokens is None:
                return None
            tokens += max(0, min(guessed, int(self._tokens.capacity) - tokens))
            taken = self._tokens.take(tokens)
            if taken is not None:
                return taken
            most, wait = self._tokens.capacity, self._tokens.seconds_until(tokens)
        if math.isinf(wait):
            says = f"prompt and max_tokens are {tokens} tokens, this key has {most:.0f} a minute (tokens_per_minute)"
            raise ApiError(400, says, param="max_tokens", code="invalid_value")
        raise _too_many(
            f"this key has {most:.0f} tokens a minute (tokens_per_minute), and {tokens} are not left of them", wait
        )

    def end(self, taken: list[Taken], used: int, *, counted: bool) -> None:
        """Told of the end of a request, and of the tokens that it used."""
        with self._lock:
            self._running -= counted
            for place, each in enumerate(taken, 1):
                part = used if place == len(taken) else min(used, int(each.amount))
                each.bucket.settle(each, part)
                used -= part

    def priority(self, asked: int | None) -> int:
        """Of a request. Raises ApiError 400 for one that is more urgent than the key may be."""
        if asked is not None and asked < self.key.priority:
            message = f"priority must be at least {self.key.priority} with this key, not {asked}"
            raise ApiError(400, message, param="priority", code="invalid_value")
        return self.key.priority if asked is None else asked

    def check_keep_alive(self) -> None:
        """Raises ApiError 403 where the key's requests may not say how long a model stays."""
        if not self.key.keep_alive:
            message = "keep_alive is not for this key: it needs keep_alive = true in the keys file"
            raise ApiError(403, message, param="keep_alive", code="not_allowed")

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What is left of the rates, under OpenAI's names; none where the key has no rates."""
        found: dict[str, object] = {}
        with self._lock:
            for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
                if bucket is not None:
                    found[f"x-ratelimit-limit-{name}"] = int(bucket.capacity)
                    found[f"x-ratelimit-remaining-{name}"] = max(0, math.floor(bucket.level))
                    found[f"x-ratelimit-reset-{name}"] = f"{bucket.seconds_until(bucket.capacity):.3f}s"
        return [(name.encode(), str(value).encode()) for name, value in found.items()]


class Visit:
    """What one HTTP request takes of its key's account, until `end`."""

    def __init__(self, account: Account, *, counted: bool) -> None:
        self.account = account
        self._counted = counted
        self._taken: list[Taken] = []

    def reserve(self, tokens: int, guessed: int = 0) -> None:
        """Takes tokens that the request may use. See `Account.reserve`."""
        taken = self.account.reserve(tokens, guessed)
        if taken is not None:
            self._taken.append(taken)

    def end(self, used: int) -> None:
        """Once, when the request is over. used: tokens of its prompts and answers."""
        self.account.end(self._taken, used, counted=self._counted)


def _too_many(says: str, wait: float) -> ApiError:
    seconds = min(max(1, math.ceil(wait)), MAX_RETRY_SECONDS)
    message = f"{says}; try again in {seconds} s"
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})


OPEN = Key("anybody", b"", keep_alive=True)
"""Where no keys are set all requests are of this one."""


class OpenAccount(Account):
    """Of everybody, where no keys are set: no limits, any priority, no name."""

    def __init__(self) -> None:
        super().__init__(OPEN)

    @property
    def name(self) -> str:
        """None."""
        return ""

    @property
    def tenant(self) -> str:
        """All are one."""
        return ""

    def priority(self, asked: int | None) -> int:
        """As asked."""
        return asked or 0
