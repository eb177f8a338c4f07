"""`chat_sources`: where a model's files keep their chat templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvarn.errors import ModelFileError
from kvarn.weights import ModelFiles

GGUF_KEY = "tokenizer.chat_template"
DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of a model's only or usual template, and of the one for conversations with tools."""


def chat_sources(files: ModelFiles) -> dict[str, str]:
    """Jinja sources by name; empty where the model has none. Raises ModelFileError where one is no text."""
    sources = _from_gguf(files.metadata) if files.format == "gguf" else _from_folder(files)
    for name, source in sources.items():
        if not isinstance(source, str):
            raise ModelFileError("must be text", path=str(files.path), field=f"chat_template {name!r}")
    return {name: source for name, source in sources.items() if source.strip()}


def _from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    named = {key.removeprefix(f"{GGUF_KEY}."): metadata[key] for key in metadata if key.startswith(f"{GGUF_KEY}.")}
    return {**({DEFAULT: metadata[GGUF_KEY]} if GGUF_KEY in metadata else {}), **named}


def _from_folder(files: ModelFiles) -> dict[str, Any]:
    """tokenizer_config.json has one template or a list of named ones; chat_template.jinja goes before it."""
    from kvarn.text.hf import tokenizer_config

    stated = tokenizer_config(files).get("chat_template")
    if isinstance(stated, list):
        sources = _named(stated, str(files.path))
    else:
        sources = {} if stated is None else {DEFAULT: stated}
    file = files.file("chat_template.jinja")
    if file is not None:
        try:
            sources[DEFAULT] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"cannot be read: {error}", path=str(file)) from error
    return sources


def _named(entries: Iterable[Any], path: str) -> dict[str, Any]:
    sources: dict[str, Any] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ModelFileError("must have a name and a template", path=path, field=f"chat_template[{index}]")
        sources[entry["name"]] = entry.get("template")
    return sources
