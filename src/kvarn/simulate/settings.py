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
from kvarn.runner.block_file import slots_in
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
    ttft_slo_ms: float = 0.0
    """Milliseconds within which a first token must be expected, or the request is refused; 0: any time will do."""
    kv_offload_bytes: int = 0
    """Of the second tier's file; 0: none."""
    kv_bytes_per_token: int = 0
    """Of the KV cache, of all KV groups together, for the second tier."""
    kv_move_bandwidth: float = 0.0
    """Bytes a second between the cache and the second tier, in either direction."""
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
        for name in ("window", "itl_target_ms", "ttft_slo_ms", "kv_offload_bytes", "kv_bytes_per_token",
                     "kv_move_bandwidth"):  # fmt: skip
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.kv_offload_bytes and not self.prefix_cache:
            raise ConfigError("prefix_cache must be true where there is kv_offload_bytes")
        if self.ttft_slo_ms and self.batching != "continuous":
            raise ConfigError(f"ttft_slo_ms is for continuous batching, not for {self.batching}")
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
            ttft_slo_ms=self.ttft_slo_ms or None,
        )

    @property
    def block_bytes(self) -> int:
        """Of the KV of a block's tokens the share of one KV group."""
        return self.block_size * self.kv_bytes_per_token // len(self.windows)

    @property
    def tier_slots(self) -> int:
        """Blocks that the second tier holds. Raises ConfigError where it is not known what they take, or too little."""
        if not self.kv_offload_bytes:
            return 0
        for name in ("kv_bytes_per_token", "kv_move_bandwidth"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must be given where there is kv_offload_bytes (see `kvarn bench steps`)")
        slots = slots_in(self.kv_offload_bytes, self.block_bytes)
        if not slots:
            raise ConfigError(f"kv_offload_bytes {self.kv_offload_bytes} has no room for a block")
        return slots

    @property
    def move_seconds(self) -> float:
        """To save a block to the second tier, or to load it."""
        return self.block_bytes / self.kv_move_bandwidth if self.kv_move_bandwidth else 0.0


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


def with_kv(settings: Settings, bytes_per_token: int, move_bandwidth: float) -> Settings:
    """The same, with what was measured of KV where the settings do not say it."""
    return dataclasses.replace(
        settings,
        kv_bytes_per_token=settings.kv_bytes_per_token or bytes_per_token,
        kv_move_bandwidth=settings.kv_move_bandwidth or move_bandwidth,
    )


def label(settings: Settings, among: Sequence[Settings]) -> str:
    """What a run differs in from the others: "static, fcfs, 512 blocks"."""
    varying = [name for name in FIELDS if len({getattr(other, name) for other in among}) > 1]
    shown = varying or ["batching", "policy"]
    words = (
        str(getattr(settings, name)) if name in ("batching", "policy") else f"{name} {getattr(settings, name)}"
        for name in shown
    )
    return ", ".join(words)
