"""What is simulated: the settings of one run, alone or as all combinations of several values."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarn.config import SchedulerConfig
from kvarn.errors import ConfigError
from kvarn.simulate.batching import BATCHINGS


@dataclass(frozen=True, slots=True)
class Settings:
    """One simulated server. Raises ConfigError naming the setting at fault."""

    batching: str = "continuous"
    policy: str = "fcfs"
    num_blocks: int = 4096
    """Of the KV cache."""
    block_size: int = 16
    max_model_len: int = 8192
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_num_queued_requests: int = 1_000_000
    prefix_cache: bool = True
    itl_target_ms: float = 0.0
    """Milliseconds that a step with decodes is kept to where prompts are chunked; 0: none."""
    window: float = 1.0
    """Seconds that dynamic batching waits for a batch to fill."""
    windowed_groups: int = 0
    """KV groups of layers with a sliding window, beside one whose layers see all; a block is one group's."""
    sliding_window: int = 512
    """Tokens that their layers see."""

    def __post_init__(self) -> None:
        if self.batching not in BATCHINGS:
            raise ConfigError(f"batching must be one of {', '.join(BATCHINGS)}, not {self.batching!r}")
        for name, least, most in (
            ("num_blocks", 1, 1 << 26), ("block_size", 1, 1 << 20), ("max_model_len", 1, 1 << 31),
            ("windowed_groups", 0, 1 << 8), ("sliding_window", 1, 1 << 31),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must be between {least} and {most}, not {getattr(self, name)}")
        if not (math.isfinite(self.window) and self.window >= 0):
            raise ConfigError(f"window must be seconds of at least 0, not {self.window}")
        self.scheduler()

    @property
    def windows(self) -> tuple[int | None, ...]:
        """What the layers of each KV group see; None: all."""
        return (None, *(self.sliding_window,) * self.windowed_groups)

    def scheduler(self) -> SchedulerConfig:
        """The scheduler's settings."""
        return SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_queued_requests=self.max_num_queued_requests,
            policy=self.policy,
            itl_target_ms=self.itl_target_ms or None,
        )


FIELDS = {field.name: type(field.default) for field in dataclasses.fields(Settings)}


def read_settings(path: Path) -> list[Settings]:
    """The runs of a JSON file: an object or a list of them, each with fields of `Settings`; the others at default.

    A field may have a list of values: then there is a run for each combination. Raises ConfigError naming the field.
    """
    try:
        content: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--config: {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"--config: {path.name} is not a JSON file") from None
    several = content if isinstance(content, list) else [content]
    runs: list[Settings] = []
    for number, item in enumerate(several, 1):
        if not isinstance(item, dict):
            raise ConfigError(f"--config: item {number} of {path.name} is not an object")
        runs += combinations({name: values if isinstance(values, list) else [values] for name, values in item.items()})
    if not runs:
        raise ConfigError(f"--config: {path.name} has no runs")
    return runs


def combinations(values: Mapping[str, Sequence[object]], base: Settings | None = None) -> list[Settings]:
    """A run for each combination of the values, the last name's changing fastest. base: the other settings."""
    for name, choices in values.items():
        if name not in FIELDS:
            raise ConfigError(f"--config: there is no setting {name[:60]!r}; there are {', '.join(FIELDS)}")
        for choice in choices:
            kind = FIELDS[name]
            fits = type(choice) in (int, float) if kind is float else type(choice) is kind
            if not fits:
                raise ConfigError(f"--config: {name} must be a {kind.__name__}, not {choice!r:.60}")
    base = base or Settings()
    names = list(values)
    return [
        dataclasses.replace(base, **dict(zip(names, chosen, strict=True)))  # type: ignore[arg-type]
        for chosen in itertools.product(*values.values())
    ]


def label(settings: Settings, among: Sequence[Settings]) -> str:
    """What a run differs in from the others: "static, fcfs, 512 blocks"."""
    varying = [name for name in FIELDS if len({getattr(other, name) for other in among}) > 1]
    shown = varying or ["batching", "policy"]
    words = (
        str(getattr(settings, name)) if name in ("batching", "policy") else f"{name} {getattr(settings, name)}"
        for name in shown
    )
    return ", ".join(words)
