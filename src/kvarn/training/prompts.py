"""What to ask a model so that it talks: prompts from a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarn.errors import ConfigError
from kvarn.text import Tokenizer

FIELDS = ("messages", "prompt", "question", "turns", "text")
MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts in the file's order, and the file's sha256."""

    texts: tuple[str | list[dict[str, Any]], ...]
    """Each the text of one message, or a conversation."""
    sha256: str

    def token_ids(self, tokenizer: Tokenizer, number: int) -> list[int]:
        """A prompt as the model's chat template has it. Raises what `Tokenizer.encode_chat` raises."""
        text = self.texts[number]
        return tokenizer.encode_chat([{"role": "user", "content": text}] if isinstance(text, str) else text)


def read_prompts(path: Path) -> Prompts:
    """Reads a UTF-8 file: each line a prompt, or in a .jsonl file an object with one of `FIELDS`.

    messages: a conversation; prompt, question, text: a message; turns: messages, of which the first is taken. Empty
    lines are skipped. Raises ConfigError naming file and line.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"--data: {path} is larger than {MAX_FILE_BYTES} bytes")
        content = path.read_bytes()
        text = content.decode()
    except OSError as error:
        raise ConfigError(f"--data: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--data: {path} is not UTF-8 at byte {error.start}") from error
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    filled = ((number, line) for number, line in lines if line)
    texts = tuple(_objects(path, filled)) if path.suffix == ".jsonl" else tuple(line for _, line in filled)
    if not texts:
        raise ConfigError(f"--data: {path} has no prompts")
    return Prompts(texts, hashlib.sha256(content).hexdigest())


def _objects(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[str | list[dict[str, Any]]]:
    for number, line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--data: {path}: line {number} is not JSON") from error
        found = _prompt(value) if isinstance(value, dict) else None
        if found is None:
            raise ConfigError(f"--data: {path}: line {number} must be an object with one of {', '.join(FIELDS)}")
        yield found


def _prompt(value: dict[str, Any]) -> str | list[dict[str, Any]] | None:
    name = next((name for name in FIELDS if name in value), None)
    given = value[name] if name is not None else None
    if name == "turns" and isinstance(given, list) and given:
        given = given[0]
    if name == "messages":
        valid = isinstance(given, list) and given and all(isinstance(message, dict) for message in given)
        return given if valid else None
    return given if isinstance(given, str) and given.strip() else None
