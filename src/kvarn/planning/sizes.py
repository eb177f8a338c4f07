"""Bytes as people write and read them."""

from __future__ import annotations

import re

from kvarn.errors import ConfigError

UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
MOST = 1 << 60
_SIZE = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,3})")


def parse_size(name: str, text: str) -> int:
    """Bytes of "2GiB", "500MB", "1.5 GiB" or "1000000". Raises ConfigError naming the setting."""
    match = _SIZE.fullmatch(text.strip())
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ConfigError(
            f"{name} must be bytes as a number, with a unit if you like (2GiB, 500MB, 1000000), not {text[:40]!r}"
        )
    number = match[1]
    value = int(float(number) * unit) if "." in number else int(number) * unit
    if value > MOST:
        raise ConfigError(f"{name} must be at most {MOST} bytes, not {text[:40]!r}")
    return value


def size_text(num_bytes: int) -> str:
    """Bytes for people: 1.25 GiB."""
    if num_bytes < 1 << 20:
        return f"{num_bytes / 1024:.1f} KiB"
    return f"{num_bytes / (1 << 20):.1f} MiB" if num_bytes < 1 << 30 else f"{num_bytes / (1 << 30):.2f} GiB"
