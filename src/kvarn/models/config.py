"""`ModelConfig`: what the rest of kvarn may know of a model beside its program, and the checked reading of configs."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from kvarn.errors import ModelFileError, UnsupportedModelError

MAX_EXTENT = 1 << 24
MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and ids of a model. max_positions: the longest sequence it was made for."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    tie_embeddings: bool
    norm_eps: float
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


def shown(value: object) -> str:
    """A value of a file for a message: at most a line of it."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    return short.repr(value)


def is_number(value: object) -> bool:
    """Whether it is an integer or a finite float (and no boolean)."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


class ConfigReader:
    """Reads fields of a config that nobody vouches for. Every method raises ModelFileError naming field and limit.

    A field that is absent and one that is null are the same, except where `filled` gave it a default.

    prefix: put before every key ("llama." for GGUF). tensor_names: the tensors beside the config, where known.
    """

    def __init__(
        self, values: Mapping[str, Any], *, path: str, prefix: str = "", tensor_names: Collection[str] | None = None
    ) -> None:
        self.values = values
        self.path = path
        self.prefix = prefix
        self.tensor_names = tensor_names

    def filled(self, defaults: Mapping[str, Any]) -> ConfigReader:
        """The same config with defaults for absent fields; a field that is null stays so."""
        present = {self.prefix + key: value for key, value in defaults.items()}
        return ConfigReader(
            {**present, **self.values}, path=self.path, prefix=self.prefix, tensor_names=self.tensor_names
        )

    def fail(self, key: str, message: str) -> ModelFileError:
        """The error for a field whose value is wrong."""
        return ModelFileError(message, path=self.path, field=self.prefix + key)

    def unsupported(self, key: str, message: str) -> UnsupportedModelError:
        """The error for a field whose value is sound, but asks for what kvarn does not run."""
        return UnsupportedModelError(f"{self.path}: {self.prefix}{key}: {message}")

    def get(self, key: str) -> Any:
        """The raw value; None where it is absent."""
        return self.values.get(self.prefix + key)

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_EXTENT) -> int:
        """An integer in low … high. Without a default the field is required."""
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.fail(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, f"must be an integer from {low} to {high}, not {shown(value)}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number above `low`, at most `high`."""
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.fail(key, "is missing")
        if not is_number(value):
            raise self.fail(key, f"must be a number, not {shown(value)}")
        if not low < value <= high:
            raise self.fail(key, f"must be above {low:g} and at most {high:g}, not {shown(value)}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A positive number, or None where it is absent or null."""
        return None if self.get(key) is None else self.number(key)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, not {shown(value)}")
        return value

    def choice(self, key: str, default: str, choices: Mapping[str, str]) -> str:
        """choices[value] of a string field. Raises UnsupportedModelError for a string that is none of them."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.fail(key, f"must be a string, not {shown(value)}")
        if value not in choices:
            raise self.unsupported(key, f"{shown(value)} is not supported ({', '.join(choices)} are)")
        return choices[value]

    def section(self, key: str) -> ConfigReader | None:
        """A nested object as a reader; None where it is absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.fail(key, f"must be an object, not {shown(value)}")
        return ConfigReader(value, path=f"{self.path}: {self.prefix}{key}")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them; empty where it is absent or null."""
        value = self.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < MAX_EXTENT for i in ids):
            raise self.fail(key, f"must be token ids, not {shown(value)}")
        return tuple(ids)

    def has_tensor(self, name: str) -> bool:
        """Whether the files are known to hold this tensor."""
        return self.tensor_names is not None and name in self.tensor_names
