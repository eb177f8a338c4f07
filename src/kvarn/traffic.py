"""Traffic: when requests arrive and how long they are. Read from files, cut, and scaled."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from kvarn.errors import ConfigError

MAX_REQUESTS = 5_000_000
MAX_TOKENS = 10_000_000
"""Of one request."""
MAX_LINE = 65_536
MAX_NAME = 256
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
JSON_FIELDS = frozenset({"arrival", "prompt_tokens", "output_tokens", "tenant", "prefix_group", "prefix_tokens"})


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. time: seconds since the begin of the traffic."""

    time: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    prefix_group: str = ""
    prefix_tokens: int = 0
    """How many of the prompt's first tokens are those of its group; its other tokens are its own."""


def read_traffic(path: Path) -> list[Arrival]:
    """The requests of a file, in order of time, the first at 0.

    .csv: the columns TIMESTAMP, ContextTokens and GeneratedTokens of the Azure LLM inference traces. .jsonl: an object
    a line with arrival (seconds), prompt_tokens, output_tokens and, if wanted, tenant, prefix_group and prefix_tokens.
    Raises ConfigError naming file, line and field.
    """
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"--trace must name a .csv or a .jsonl file, not {path.name!r}")
    try:
        with path.open(encoding="utf-8", errors="strict", newline="") as file:
            arrivals = list(reader(path.name, _lines(path.name, file)))
    except OSError as error:
        raise ConfigError(f"--trace: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name} is not a text file in UTF-8") from None
    if not arrivals:
        raise ConfigError(f"{path.name} has no requests")
    return from_zero(arrivals)


def from_zero(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """In order of time, the first at 0."""
    ordered = sorted(arrivals, key=lambda arrival: arrival.time)
    first = ordered[0].time if ordered else 0.0
    return [replace(arrival, time=arrival.time - first) for arrival in ordered]


def cut(arrivals: Sequence[Arrival], start: float, duration: float | None) -> list[Arrival]:
    """Those of `duration` seconds from `start` on (None: to the end), the first of them at 0."""
    end = math.inf if duration is None else start + duration
    return from_zero(arrival for arrival in arrivals if start <= arrival.time < end)


def scale(arrivals: Sequence[Arrival], *, speed: float = 1.0, tokens: float = 1.0) -> list[Arrival]:
    """`speed` times as many requests a second; lengths times `tokens`, at least 1."""

    def length(count: int) -> int:
        return max(1, round(count * tokens))

    return [
        replace(
            arrival,
            time=arrival.time / speed,
            prompt_tokens=length(arrival.prompt_tokens),
            output_tokens=length(arrival.output_tokens),
            prefix_tokens=min(round(arrival.prefix_tokens * tokens), length(arrival.prompt_tokens)),
        )
        for arrival in arrivals
    ]


def repeat(arrivals: Sequence[Arrival], count: int) -> list[Arrival]:
    """The first `count` requests of the traffic said over and over."""
    period = arrivals[-1].time * (1 + 1 / max(1, len(arrivals) - 1)) or 1.0
    rounds = -(-count // len(arrivals))
    again = (replace(arrival, time=arrival.time + period * n) for n in range(rounds) for arrival in arrivals)
    return [arrival for arrival, _ in zip(again, range(count), strict=False)]


def _lines(name: str, file: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if len(line) > MAX_LINE:
            raise ConfigError(f"{name}, line {number}: longer than {MAX_LINE} characters")
        if number > MAX_REQUESTS + 1:
            raise ConfigError(f"{name} has more than {MAX_REQUESTS} requests")
        yield line


def _read_csv(name: str, lines: Iterator[str]) -> Iterator[Arrival]:
    rows = csv.reader(lines)
    try:
        header = [cell.strip() for cell in next(rows, [])]
        missing = [column for column in AZURE_COLUMNS if column not in header]
        if missing:
            wanted = ", ".join(AZURE_COLUMNS)
            raise ConfigError(f"{name}, line 1: there is no column {missing[0]}; a trace has {wanted}")
        places = [header.index(column) for column in AZURE_COLUMNS]
        for number, row in enumerate(rows, 2):
            if not row:
                continue
            where = f"{name}, line {number}"
            if len(row) != len(header):
                raise ConfigError(f"{where}: {len(row)} fields where the header has {len(header)}")
            stamp, prompt, output = (row[place].strip() for place in places)
            yield Arrival(
                _timestamp(where, stamp),
                _tokens(where, "ContextTokens", _integer(prompt)),
                _tokens(where, "GeneratedTokens", _integer(output)),
            )
    except csv.Error as error:
        raise ConfigError(f"{name}: not a CSV file: {error}") from None


def _timestamp(where: str, text: str) -> float:
    try:
        return datetime.fromisoformat(text[:40]).timestamp()
    except (ValueError, OverflowError, OSError):
        raise ConfigError(
            f"{where}: TIMESTAMP must be a date and time as 2023-11-16 18:15:46.68, not {text[:40]!r}"
        ) from None


def _integer(text: str) -> object:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else text


def _tokens(where: str, field: str, value: object, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= MAX_TOKENS:
        raise ConfigError(f"{where}: {field} must be a whole number from {least} to {MAX_TOKENS}, not {_shown(value)}")
    return value


def _read_jsonl(name: str, lines: Iterator[str]) -> Iterator[Arrival]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _json_arrival(f"{name}, line {number}", line)


def _json_arrival(where: str, line: str) -> Arrival:
    try:
        item: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise ConfigError(f"{where}: not a JSON object") from None
    if not isinstance(item, dict):
        raise ConfigError(f"{where}: not a JSON object")
    unknown = next((key for key in item if key not in JSON_FIELDS), None)
    if unknown is not None:
        raise ConfigError(f"{where}: there is no field {_shown(unknown)}; fields are {', '.join(sorted(JSON_FIELDS))}")
    time = item.get("arrival")
    if isinstance(time, bool) or not isinstance(time, int | float) or not (math.isfinite(time) and 0 <= time <= 1e12):
        raise ConfigError(f"{where}: arrival must be seconds from 0 to 1e12, not {_shown(time)}")
    names = {}
    for field in ("tenant", "prefix_group"):
        names[field] = item.get(field, "")
        if not isinstance(names[field], str) or len(names[field]) > MAX_NAME:
            raise ConfigError(
                f"{where}: {field} must be a string of at most {MAX_NAME} characters, not {_shown(names[field])}"
            )
    prompt = _tokens(where, "prompt_tokens", item.get("prompt_tokens"))
    shared = _tokens(where, "prefix_tokens", item.get("prefix_tokens", 0), least=0)
    if shared > prompt:
        raise ConfigError(f"{where}: prefix_tokens must be at most prompt_tokens ({prompt}), not {shared}")
    if shared and not names["prefix_group"]:
        raise ConfigError(f"{where}: prefix_group must be given where prefix_tokens is")
    output = _tokens(where, "output_tokens", item.get("output_tokens"))
    return Arrival(float(time), prompt, output, names["tenant"], names["prefix_group"], shared)


def _shown(value: object) -> str:
    return repr(value)[:60]
