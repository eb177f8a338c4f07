"""`AccessOptions`: who may ask a server, from where, and over what."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvarn.server.cors import check_origins
from kvarn.server.listening import Tls


@dataclass(frozen=True, slots=True)
class AccessOptions:
    """Without keys and a file of keys everybody may ask. Raises ConfigError."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys that are good, each a tenant's."""
    keys_file: Path | None = None
    """More keys; see `kvarn.server.keys.file`."""
    metrics_open: bool = False
    """Whether /metrics needs no key."""
    cors_origins: tuple[str, ...] = ()
    """Of pages that may ask; see `kvarn.server.cors`."""
    tls: Tls = field(default_factory=Tls)

    def __post_init__(self) -> None:
        check_origins(self.cors_origins)
