"""`TextStore`: texts and their hidden states in mapped files of bounded size."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import ConfigError

SPAN = np.dtype([("number", "<i8"), ("start", "<i8"), ("prompt", "<i8"), ("length", "<i8")])


@dataclass(frozen=True, slots=True)
class Text:
    """One answered prompt. Its tokens and rows are those from `start` on in the store."""

    number: int
    """The prompt's place in its file."""
    start: int
    prompt_length: int
    length: int
    """Tokens of prompt and answer; all but the last one have hidden states."""


class TextStore:
    """Tokens, hidden states and spans of texts, each in a file of one folder. One process at a time.

    tokens: int32[capacity]. features: float16[capacity, width], of each token the hidden state that the last layer
    leaves, scaled to a mean square of 1 (which the model's last norm makes of it anyway). The files have holes until
    they are filled. A text counts once its span is written, after all else of it.
    """

    def __init__(self, folder: Path, width: int, num_bytes: int, identity: dict[str, object]) -> None:
        """Opens the folder, or makes it. num_bytes: of tokens and hidden states at most. identity: what texts depend
        on. Raises ConfigError where the folder holds texts of another identity, or there is no room."""
        self._capacity = num_bytes // (2 * width + 4)
        if self._capacity < 1:
            raise ConfigError(f"--data-bytes must be at least {2 * width + 4}, not {num_bytes}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._identify(folder, {**identity, "width": width, "capacity": self._capacity})
            self.tokens = _mapped(folder / "tokens", np.dtype("<i4"), (self._capacity,))
            self.features = _mapped(folder / "features", np.dtype("<f2"), (self._capacity, width))
            self._spans = folder / "spans"
            self.texts = self._read()
        except OSError as error:
            raise ConfigError(f"{folder}: {error.strerror or error}") from error
        self._used = max((text.start + text.length for text in self.texts), default=0)

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return self._used

    def add(
        self, number: int, prompt_length: int, tokens: NDArray[np.int32], features: NDArray[np.float16]
    ) -> bool:
        """Appends a text. features: a row less than tokens. False, and nothing is kept, where it does not fit."""
        start, length = self._used, len(tokens)
        if start + length > self._capacity:
            return False
        self.tokens[start : start + length] = tokens
        self.features[start : start + length - 1] = features
        with self._spans.open("ab") as file:
            file.write(np.array([(number, start, prompt_length, length)], SPAN).tobytes())
        self.texts.append(Text(number, start, prompt_length, length))
        self._used += length
        return True

    def _read(self) -> list[Text]:
        """What is whole: a text that was cut off in its span is not."""
        if not self._spans.exists():
            return []
        content = self._spans.read_bytes()
        whole = len(content) // SPAN.itemsize * SPAN.itemsize
        os.truncate(self._spans, whole)
        texts = [Text(*map(int, span)) for span in np.frombuffer(content[:whole], SPAN)]
        for text in texts:
            if not (text.start >= 0 and 0 < text.prompt_length < text.length <= self._capacity - text.start):
                raise ConfigError(f"{self._spans}: damaged; remove the folder and collect anew")
        return texts

    def _identify(self, folder: Path, identity: dict[str, object]) -> None:
        path, said = folder / "identity.json", json.dumps(identity, sort_keys=True, indent=1)
        if not path.exists():
            path.write_text(said, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != said:
            raise ConfigError(
                f"{folder} holds texts of another model, data file or setting; give another --work folder, or remove it"
            )


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    size = int(np.prod(shape)) * dtype.itemsize
    with path.open("ab") as file:
        if file.tell() != size:
            file.truncate(size)
    return np.memmap(path, dtype, "r+", shape=shape)
