"""Prompts by task, from files of Spec-Bench, HumanEval and the like."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarn.errors import ConfigError
from kvarn.text import Tokenizer

CONVERSATION = "conversation"
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""Categories that Spec-Bench (Xia et al. 2024, section 4) counts as one task, ten questions each."""
MOST_LINES = 1_000_000


@dataclass(frozen=True, slots=True)
class TaskText:
    """A prompt as a file has it, and the task that it is of."""

    task: str
    text: str


@dataclass(frozen=True, slots=True)
class TaskPrompt:
    """A prompt as tokens."""

    task: str
    token_ids: tuple[int, ...]


def read_texts(paths: Sequence[Path], per_task: int) -> list[TaskText]:
    """At most `per_task` prompts of each task, from all over the files, tasks in the files' order.

    A line is an object whose prompt is the first of its `turns`, or its `prompt` or `question`; its task is its
    `category` or `task`, else the file's name. Raises ConfigError naming file and line.
    """
    tasks: dict[str, list[TaskText]] = {}
    for path in paths:
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                text = _text(line, f"--data: {path.name}, line {number}", _stem(path))
                tasks.setdefault(text.task, []).append(text)
    if not tasks:
        raise ConfigError(f"--data: there are no prompts in {', '.join(path.name for path in paths)}")
    return [text for texts in tasks.values() for text in _spread(texts, per_task)]


def encode(texts: Sequence[TaskText], tokenizer: Tokenizer, *, raw: bool) -> list[TaskPrompt]:
    """Tokens of the prompts. raw: as they are, not as the first message of a chat."""

    def tokens(text: str) -> list[int]:
        if raw:
            return tokenizer.encode(text, add_special_tokens=True)
        return tokenizer.encode_chat([{"role": "user", "content": text}])

    return [TaskPrompt(text.task, tuple(tokens(text.text))) for text in texts]


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--data: cannot read {path}: {reason}") from error
    lines = text.splitlines()
    if len(lines) > MOST_LINES:
        raise ConfigError(f"--data: {path.name} must have at most {MOST_LINES} lines, not {len(lines)}")
    return lines


def _text(line: str, place: str, name: str) -> TaskText:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{place} must be an object")
    text = _prompt(record)
    if not text:
        raise ConfigError(f"{place} must have a text as `prompt` or `question`, or a list of texts as `turns`")
    task = record.get("category", record.get("task", name))
    if not isinstance(task, str):
        raise ConfigError(f"{place}: the category must be a text")
    return TaskText(CONVERSATION if task in MT_BENCH else task, text)


def _prompt(record: dict[str, Any]) -> str | None:
    turns = record.get("turns")
    found = turns[0] if isinstance(turns, list) and turns else record.get("prompt", record.get("question"))
    return found if isinstance(found, str) else None


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _spread(texts: Sequence[TaskText], most: int) -> list[TaskText]:
    count = min(most, len(texts))
    return [texts[place * len(texts) // count] for place in range(count)]
