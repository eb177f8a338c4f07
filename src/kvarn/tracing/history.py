"""A trace file read back: its steps, and the life of each sequence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvarn.errors import ConfigError
from kvarn.tracing.chrome import ENGINE, FORMAT, REQUESTS

MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Step:
    """One step; seconds since the begin of the trace."""

    number: int
    begin: float
    end: float
    num_tokens: int
    budget: int
    num_sequences: int
    held: tuple[str, str] | None
    """(request, reason)."""
    waiting: int
    evicted_blocks: int


@dataclass(frozen=True, slots=True)
class Share:
    """What a sequence computed in a step."""

    step: int
    begin: float
    end: float
    start: int
    count: int
    sampled: bool
    drafted: int = 0
    accepted: int = 0
    """Of the `drafted` tokens that were guessed and computed behind the others, those that became output."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What a sequence went through: see `recorder.Happened`."""

    kind: str
    time: float
    step: int
    tokens: int
    reason: str


@dataclass(slots=True)
class Life:
    """A sequence."""

    request_id: str
    moments: list[Moment] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)


@dataclass(slots=True)
class History:
    """A whole trace. lives: by sequence id, in order of appearance."""

    steps: dict[int, Step] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds spent scheduling, executing and booking."""
    lives: dict[int, Life] = field(default_factory=dict)
    dropped_steps: int = 0

    def of_request(self, request_id: str) -> list[Life]:
        """The sequences of a request, by its id or the begin of it. Raises ConfigError for none, or several."""
        exact = [life for life in self.lives.values() if life.request_id == request_id]
        found = exact or [life for life in self.lives.values() if life.request_id.startswith(request_id)]
        names = sorted({life.request_id for life in found})
        if not names:
            raise ConfigError(f"the trace has no request {request_id[:100]!r}; `kvarn trace show` lists some of them")
        if len(names) > 1:
            raise ConfigError(f"{request_id[:100]!r} begins {len(names)} requests: {', '.join(names[:3])}, …")
        return found


def read_trace(path: Path) -> History:
    """Reads a file that `write_trace` wrote. Raises ConfigError naming the event and field where it is another's."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path.name} is larger than {MAX_BYTES} bytes")
        content: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path.name} is not a JSON file") from None
    about = content.get("otherData") if isinstance(content, dict) else None
    events = content.get("traceEvents") if isinstance(content, dict) else None
    if not isinstance(about, dict) or about.get("format") != FORMAT or not isinstance(events, list):
        raise ConfigError(f"{path.name} is no trace that `kvarn serve --trace-file` wrote")
    history = History(dropped_steps=_Fields(f"{path.name}, otherData", about).integer("dropped_steps"))
    for number, event in enumerate(events, 1):
        where = f"{path.name}, event {number}"
        if not isinstance(event, dict):
            raise ConfigError(f"{where}: not an object")
        _take(history, _Fields(where, event))
    return history


def _take(history: History, event: _Fields) -> None:
    kind, pid = event.text("ph"), event.integer("pid")
    reader = _READERS.get((kind, pid))
    if reader is not None:
        reader(history, event, event.object("args"))


def _take_step(history: History, event: _Fields, args: _Fields) -> None:
    begin, end = event.span()
    if "step" not in args.values:
        name = event.text("name")
        history.phases[name] = history.phases.get(name, 0.0) + end - begin
        return
    shape = args.object("shape")
    held = args.object("held") if args.values.get("held") is not None else None
    step = Step(
        args.integer("step"), begin, end, shape.integer("num_tokens"), args.integer("budget"),
        shape.integer("num_sequences"), None if held is None else (held.text("request"), held.text("reason")),
        args.integer("waiting"), args.integer("evicted_blocks"),
    )  # fmt: skip
    history.steps[step.number] = step


def _take_share(history: History, event: _Fields, args: _Fields) -> None:
    begin, end = event.span()
    life = _life(history, event, args)
    sampled = args.values.get("sampled") is True
    drafts = (args.integer("drafted"), args.integer("accepted")) if "drafted" in args.values else (0, 0)
    life.shares.append(
        Share(args.integer("step"), begin, end, args.integer("start"), args.integer("count"), sampled, *drafts)
    )


def _take_moment(history: History, event: _Fields, args: _Fields) -> None:
    life = _life(history, event, args)
    life.moments.append(
        Moment(event.text("name"), event.number("ts") / 1e6, args.integer("step"), args.integer("tokens"),
               args.text("reason"))
    )  # fmt: skip


def _life(history: History, event: _Fields, args: _Fields) -> Life:
    return history.lives.setdefault(event.integer("tid"), Life(args.text("request")))


_READERS: dict[tuple[str, int], Callable[[History, _Fields, _Fields], None]] = {
    ("X", ENGINE): lambda history, event, args: _take_step(history, event, args),
    ("X", REQUESTS): _take_share,
    ("i", REQUESTS): _take_moment,
}


class _Fields:
    """An object of the file, whose fields are checked when they are read."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self.where = where
        self.values = values

    def integer(self, name: str) -> int:
        value = self.values.get(name)
        if type(value) is not int:
            raise self._wrong(name, "a whole number")
        return value

    def number(self, name: str) -> float:
        value = self.values.get(name)
        if type(value) not in (int, float):
            raise self._wrong(name, "a number")
        return float(value)  # type: ignore[arg-type]

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def object(self, name: str) -> _Fields:
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return _Fields(f"{self.where}: {name}", value)

    def span(self) -> tuple[float, float]:
        """Begin and end in seconds."""
        begin = self.number("ts") / 1e6
        return begin, begin + self.number("dur") / 1e6

    def _wrong(self, name: str, must: str) -> ConfigError:
        return ConfigError(f"{self.where}: {name} must be {must}, not {self.values.get(name)!r:.40}")
