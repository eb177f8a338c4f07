"""`keep_alive`: how long a model stays in memory after its last request, as Ollama's clients say it."""

from __future__ import annotations

import math
import re

FOREVER = math.inf
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(ms|s|m|h)")
_NUMBER = re.compile(r"-?[0-9]{1,12}(?:\.[0-9]{1,9})?")
MOST_SECONDS = 366 * 24 * 3600.0
MUST = 'must be seconds, or a duration such as "90s", "10m" or "1h30m"; 0 unloads the model, a negative one keeps it'


def parse_keep_alive(value: object) -> float:
    """Seconds of a number, a number as text, or a duration ("1h30m"). 0: not at all; negative: `FOREVER`.

    Raises ValueError for anything else, and for more than a year.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(MUST)
    seconds = _seconds(value.strip()) if isinstance(value, str) else float(value)
    if math.isnan(seconds) or seconds > MOST_SECONDS:
        raise ValueError(MUST)
    return FOREVER if seconds < 0 else seconds


def _seconds(text: str) -> float:
    if _NUMBER.fullmatch(text):
        return float(text)
    sign = -1.0 if text.startswith("-") else 1.0
    text = text.removeprefix("-")
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(MUST)
    return sign * sum(float(number) * _UNITS[unit] for number, unit in parts)
