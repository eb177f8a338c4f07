"""What is asked: prompts made up or from files, and how long their answers are to be."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from kvarn.bench.serve.lengths import Lengths
from kvarn.bench.serve.tokens import TokenScale
from kvarn.bench.serve.words import COMMON
from kvarn.errors import ConfigError
from kvarn.traffic import Arrival

MAX_FILE_BYTES = 4 << 30
MAX_LINES = 1_000_000
SONNET_REQUEST = "Pick as many lines as you can from these poem lines, and write a new poem in their style:"

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to make. messages: of a chat; text: the same as one text. output_tokens: of the answer."""

    text: str
    messages: tuple[Message, ...]
    output_tokens: int

    @staticmethod
    def of(text: str, output_tokens: int) -> Prompt:
        """A user's first message."""
        return Prompt(text, ({"role": "user", "content": text},), output_tokens)


class Dataset(Protocol):
    """Prompts without end, the same for the same seed."""

    @property
    def name(self) -> str:
        """For titles."""
        ...

    def sample(self, words: int) -> str:
        """A text of so many words as its prompts have them, to ask the server for its tokens."""
        ...

    def prompts(self, seed: str, scale: TokenScale) -> Iterator[Prompt]:
        """One after the other."""
        ...


@dataclass(frozen=True)
class RandomWords:
    """Words at random, so that no prompt begins as another; with `prefixes`, each begins with one of so many texts."""

    prompt_tokens: Lengths
    output_tokens: Lengths
    prefixes: int = 0
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.prefixes <= 100_000:
            raise ConfigError(f"--prefixes must be between 0 and 100000, not {self.prefixes}")
        if bool(self.prefixes) != bool(self.prefix_tokens) or not 0 <= self.prefix_tokens <= 1_000_000:
            raise ConfigError("--prefixes and --prefix-tokens must be given together, the latter up to 1000000")

    @property
    def name(self) -> str:
        """With the lengths, in tokens."""
        shared = f", after one of {self.prefixes} prefixes of {self.prefix_tokens} tokens" if self.prefixes else ""
        return f"random words, {self.prompt_tokens} in{shared}, {self.output_tokens} out"

    def sample(self, words: int) -> str:
        """The same words for the same number."""
        return _words(random.Random(words), words)

    def prompts(self, seed: str, scale: TokenScale) -> Iterator[Prompt]:
        """Prefixes are drawn from the seed, and come in turn."""
        numbers = random.Random(f"prompts {seed}")
        shared = [_words(numbers, scale.words(self.prefix_tokens, overhead=False)) for _ in range(self.prefixes)]
        for prefix in itertools.cycle(shared or [""]):
            words = scale.words(self.prompt_tokens.draw(numbers))
            text = f"{prefix} {_words(numbers, words)}".lstrip()
            yield Prompt.of(text, self.output_tokens.draw(numbers))


@dataclass(frozen=True)
class Sonnet:
    """Lines of a poem at random, after a request that all prompts begin with. path: None for Shakespeare's sonnets."""

    prompt_tokens: Lengths
    output_tokens: Lengths
    path: Path | None = None

    @property
    def name(self) -> str:
        """The file's name, and the lengths in tokens."""
        lines = self.path.name if self.path else "sonnets"
        return f"lines of {lines}, {self.prompt_tokens} in, {self.output_tokens} out"

    @cached_property
    def _lines(self) -> list[str]:
        if self.path is None:
            text = files("kvarn.bench.serve").joinpath("sonnets.txt").read_text(encoding="utf-8")
        else:
            text = _read(self.path)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ConfigError(f"--data: {self.path} has no lines")
        return lines

    def sample(self, words: int) -> str:
        """From its begin."""
        return " ".join(itertools.islice(itertools.cycle(" ".join(self._lines).split()), words))

    def prompts(self, seed: str, scale: TokenScale) -> Iterator[Prompt]:
        """Whole lines, until a prompt has its length."""
        numbers = random.Random(f"prompts {seed}")
        while True:
            wanted = scale.words(self.prompt_tokens.draw(numbers))
            lines, count = [SONNET_REQUEST], len(SONNET_REQUEST.split())
            while count < wanted:
                lines.append(numbers.choice(self._lines))
                count += len(lines[-1].split())
            yield Prompt.of("\n".join(lines), self.output_tokens.draw(numbers))


@dataclass(frozen=True)
class Asked:
    """A prompt as a file has it, and what the length of its answer is to be: tokens, or as long as a text."""

    messages: tuple[Message, ...]
    output_tokens: int | None = None
    answer: str = ""

    @property
    def text(self) -> str:
        """All messages as one text."""
        return "\n".join(message["content"] for message in self.messages if isinstance(message.get("content"), str))


@dataclass(frozen=True)
class FromFile:
    """The prompts of a file in an order that the seed gives, over and over; those that are too long are left out."""

    path: Path
    asked: Sequence[Asked]
    output_tokens: Lengths
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    def sample(self, words: int) -> str:
        """From its begin."""
        text = " ".join(asked.text for asked in self.asked[:words]).split() or ["word"]
        return " ".join(itertools.islice(itertools.cycle(text), words))

    def prompts(self, seed: str, scale: TokenScale) -> Iterator[Prompt]:
        """Raises ConfigError where none is short enough."""
        numbers = random.Random(f"prompts {seed}")
        most = self.max_prompt_tokens
        fitting = [asked for asked in self.asked if most is None or scale.tokens(asked.text) <= most]
        if not fitting:
            raise ConfigError(f"--max-prompt-tokens {most} leaves no prompt of {self.path.name}")
        while True:
            numbers.shuffle(fitting)
            for asked in fitting:
                yield Prompt(asked.text, asked.messages, self._length(asked, numbers, scale))

    def _length(self, asked: Asked, numbers: random.Random, scale: TokenScale) -> int:
        if asked.output_tokens is not None:
            tokens = asked.output_tokens
        elif asked.answer:
            tokens = scale.tokens(asked.answer, overhead=False)
        else:
            tokens = self.output_tokens.draw(numbers)
        return min(tokens, self.max_output_tokens or tokens)


@dataclass(frozen=True)
class OfTrace:
    """Random words, as many as the requests of a trace have, in its order, over and over."""

    arrivals: Sequence[Arrival]
    name: str
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None

    def sample(self, words: int) -> str:
        """The same words for the same number."""
        return _words(random.Random(words), words)

    def prompts(self, seed: str, scale: TokenScale) -> Iterator[Prompt]:
        """Longer ones are cut."""
        numbers = random.Random(f"prompts {seed}")
        for arrival in itertools.cycle(self.arrivals):
            asked, answered = arrival.prompt_tokens, arrival.output_tokens
            words = scale.words(min(asked, self.max_prompt_tokens or asked))
            yield Prompt.of(_words(numbers, words), min(answered, self.max_output_tokens or answered))


def read_sharegpt(path: Path) -> list[Asked]:
    """The first question of each conversation of a ShareGPT file, and its answer. Raises ConfigError."""
    try:
        items = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--data: {path.name} is not JSON: {error}") from None
    if not isinstance(items, list):
        raise ConfigError(f"--data: {path.name} must be a list of conversations")
    found = [asked for item in items if (asked := _first_turns(item)) is not None]
    if not found:
        raise ConfigError(f"--data: {path.name} has no conversation that begins with a question and its answer")
    return found


def _first_turns(item: Any) -> Asked | None:
    turns = item.get("conversations", item.get("conversation")) if isinstance(item, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
        return None
    (asker, question), (_, answer) = ((turn.get("from"), turn.get("value")) for turn in turns[:2])
    if asker not in ("human", "user") or not (isinstance(question, str) and isinstance(answer, str)):
        return None
    if not (question.strip() and answer.strip()):
        return None
    return Asked(({"role": "user", "content": question},), answer=answer)


def read_jsonl(path: Path) -> list[Asked]:
    """An object a line: `messages`, or a text as `prompt`, `question` or the first of `turns`; and, where it should say
    the answer's length, `output_tokens` or `max_tokens`. Raises ConfigError naming file and line."""
    lines = ((number, line) for number, line in enumerate(_read(path).splitlines(), 1) if line.strip())
    asked = [_json_line(f"--data: {path.name}, line {number}", line) for number, line in _few(path, lines)]
    if not asked:
        raise ConfigError(f"--data: {path.name} has no prompts")
    return asked


def _json_line(where: str, line: str) -> Asked:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        item = None
    if not isinstance(item, dict):
        raise ConfigError(f"{where}: not a JSON object")
    length = item.get("output_tokens", item.get("max_tokens"))
    if length is not None and (type(length) is not int or not 1 <= length <= 1_000_000):
        raise ConfigError(f"{where}: output_tokens must be a whole number from 1 to 1000000, not {length!r:.60}")
    messages = item.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        return Asked(tuple(messages), length)
    turns = item.get("turns")
    text = turns[0] if isinstance(turns, list) and turns else item.get("prompt", item.get("question"))
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{where}: there must be `messages`, or a text as `prompt`, `question` or in `turns`")
    return Asked(({"role": "user", "content": text},), length)


def _few(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for count, line in enumerate(lines, 1):
        if count > MAX_LINES:
            raise ConfigError(f"--data: {path.name} must have at most {MAX_LINES} prompts")
        yield line


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"--data: {path.name} must have at most {MAX_FILE_BYTES >> 30} GiB")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--data: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--data: {path.name} is not a text file in UTF-8") from None


def _words(numbers: random.Random, count: int) -> str:
    return " ".join(numbers.choices(COMMON, k=count))
