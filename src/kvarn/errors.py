"""Every error kvarn raises on purpose.

    KvarnError
    ├── ConfigError            a setting is wrong or does not fit (names the field and the limit)
    │   └── CapacityError      the plan does not fit in memory (carries the nearest setting that does)
    ├── ModelFileError         a model file is truncated, inconsistent or of an unknown kind
    ├── UnsupportedModelError  the file is sound, but holds a family or a feature kvarn does not run
    ├── PullError              a download failed or its checksum is wrong
    ├── TemplateError          a chat template is invalid, refuses the messages, or exceeds its bounds
    ├── RequestError           a request is wrong; `field` names the parameter (HTTP 400)
    │   └── OverloadError      the request is fine, the server has too much to do (HTTP 429; says when to come back)
    │       ├── QueueFullError     too many requests or tokens wait
    │       └── DeadlineError      its first token would come too late
    ├── UnreadError            nobody read what came out of a request, so it was ended
    └── EngineError            the engine failed, was shut down, or got no numbers for a request (HTTP 500/503)

Messages are written for the person who can act on them: what is wrong, where, and what would be right.
"""

from __future__ import annotations


class KvarnError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(KvarnError):
    """A setting is wrong; the message names the field and the limit."""


class CapacityError(ConfigError):
    """The model with these settings does not fit; the message carries the numbers and a setting that fits."""


class ModelFileError(KvarnError):
    """A model file is damaged or inconsistent. `field` names the part of the file that is at fault."""

    def __init__(self, message: str, *, path: str | None = None, field: str | None = None) -> None:
        self.path = path
        self.field = field
        where = ": ".join(part for part in (path, field) if part)
        super().__init__(f"{where}: {message}" if where else message)


class UnsupportedModelError(KvarnError):
    """A sound model of a family, tensor type or feature that kvarn does not run."""


class PullError(KvarnError):
    """A model could not be fetched or failed verification."""


class TemplateError(KvarnError):
    """A chat template is invalid, rejects the messages, or exceeds its bounds."""


class RequestError(KvarnError):
    """A request is wrong. `field` is the parameter at fault as the client spelt it."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        self.field = field
        super().__init__(message)


class OverloadError(RequestError):
    """The engine has too much to do. reason: one of `REASONS`. retry_after: seconds after which to try again."""

    REASONS = ("queued_requests", "queued_tokens", "queued_grammars", "ttft_slo")

    def __init__(self, message: str, *, reason: str, retry_after: float = 1.0) -> None:
        self.reason = reason
        self.retry_after = retry_after
        super().__init__(message)


class QueueFullError(OverloadError):
    """One of the queue's limits is reached."""


class DeadlineError(OverloadError):
    """The first token is not to be expected in the time that was asked for."""


class UnreadError(KvarnError):
    """The reader of a stream fell so far behind that the request was ended."""


class EngineError(KvarnError):
    """The engine failed, or was closed, while a request was in flight; or the model computed NaN or infinity for it."""
