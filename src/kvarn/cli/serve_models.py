"""The models of `kvarn serve` as they are written: `[NAME=]MODEL[,setting=value…]`."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarn.cli.options import size_option
from kvarn.errors import ConfigError

if TYPE_CHECKING:
    from kvarn.config import EngineConfig
    from kvarn.server.models.hosted import ModelSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")


def parse_models(texts: Sequence[str], config: EngineConfig, served_name: str | None) -> tuple[ModelSpec, ...]:
    """What is to be served, pulled where it is not there yet. config: of all, but for what a model says of itself.

    served_name: a name for the only model, before its own. Raises ConfigError naming what is wrong, PullError.
    """
    if served_name is not None and len(texts) > 1:
        raise ConfigError("served_model_name is for one model; with several, name each: kvarn serve NAME=MODEL …")
    specs = tuple(_spec(text, config, served_name) for text in texts)
    taken: dict[str, str] = {}
    for spec, text in zip(specs, texts, strict=True):
        for name in dict.fromkeys((spec.name, *spec.aliases)):
            if name in taken:
                raise ConfigError(
                    f"{taken[name]!r} and {text!r} both go by {name!r}; name them apart: kvarn serve NAME=MODEL …"
                )
            taken[name] = text
    return specs


def _spec(text: str, config: EngineConfig, served_name: str | None) -> ModelSpec:
    from kvarn.cli.progress import resolve_with_progress
    from kvarn.engine import model_name
    from kvarn.server.models.hosted import ModelSpec

    name, source, settings = _parts(text)
    path = resolve_with_progress(source, quiet=not sys.stderr.isatty())
    names = dict.fromkeys(given for given in (served_name, name, model_name(source)) if given)
    first, *aliases = names
    keep = settings.pop("idle-unload", None)
    return ModelSpec(first, str(path), _changed(config, settings), tuple(aliases), keep)


def _parts(text: str) -> tuple[str | None, str, dict[str, Any]]:
    """Name, source and settings. A path that exists is a source as it stands."""
    if Path(text).expanduser().exists():
        return None, text, {}
    source, *settings = text.split(",")
    name: str | None = None
    if "=" in source and not Path(source).expanduser().exists():
        name, source = source.split("=", 1)
        if not _NAME.fullmatch(name):
            raise ConfigError(f"the name in {text!r} must be letters, digits and . _ : / @ + -, at most 200")
    if not source:
        raise ConfigError(f"{text!r} names no model; write NAME=MODEL")
    return name, source, dict(_setting(text, setting) for setting in settings)


def _setting(text: str, setting: str) -> tuple[str, Any]:
    name, _, value = setting.partition("=")
    name = name.strip().replace("_", "-")
    if name not in _SETTINGS:
        raise ConfigError(f"{text!r}: a model may have {', '.join(_SETTINGS)}, not {name!r}")
    return name, _SETTINGS[name](f"{name} of {text!r}", value)


def _integer(name: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise ConfigError(f"{name} must be a number, not {value[:40]!r}")
    return int(value)


def duration_option(name: str, value: str) -> float:
    """Seconds of "300", "90s" or "1h30m"; negative: for ever. Raises ConfigError naming the option."""
    from kvarn.server.keep_alive import parse_keep_alive

    try:
        return parse_keep_alive(value)
    except ValueError as error:
        raise ConfigError(f"{name} {error}, not {value[:40]!r}") from None


_SETTINGS: Mapping[str, Callable[[str, str], Any]] = {
    "max-model-len": _integer,
    "max-num-seqs": _integer,
    "kv-cache-bytes": lambda name, value: size_option(name, value),
    "idle-unload": duration_option,
}


def _changed(config: EngineConfig, settings: Mapping[str, Any]) -> EngineConfig:
    length = settings.get("max-model-len", config.max_model_len)
    seqs = settings.get("max-num-seqs", config.scheduler.max_num_seqs)
    size = settings.get("kv-cache-bytes", config.cache.kv_cache_bytes)
    return dataclasses.replace(
        config,
        max_model_len=length,
        cache=dataclasses.replace(config.cache, kv_cache_bytes=size),
        scheduler=dataclasses.replace(config.scheduler, max_num_seqs=seqs),
    )
