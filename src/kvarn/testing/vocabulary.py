"""A vocabulary of bytes: token i < 256 is byte i, then BOS, EOS, one for two NUL bytes, and spares.

Text without NULs has one token a byte. Two NULs are there because a GGUF file cannot hold an empty list of merges.
"""

from __future__ import annotations

import functools
from typing import Any

from kvarn.testing.files import MemoryFiles
from kvarn.text import Tokenizer, load_tokenizer

BOS, EOS = 256, 257
SMALLEST = 259
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NORMAL, CONTROL = 1, 3


def byte_vocabulary(size: int = SMALLEST, chat_template: str | None = CHAT_TEMPLATE) -> dict[str, Any]:
    """GGUF metadata of a byte-level vocabulary of `size` tokens (at least 259). Raises ValueError."""
    if size < SMALLEST:
        raise ValueError(f"a vocabulary of bytes has at least {SMALLEST} tokens, not {size}")
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    characters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    nul = characters[0]
    spares = [f"<spare {i}>" for i in range(size - SMALLEST)]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*characters, "<bos>", "<eos>", nul + nul, *spares],
        "tokenizer.ggml.token_type": [NORMAL] * 256 + [CONTROL] * 2 + [NORMAL] + [CONTROL] * len(spares),
        "tokenizer.ggml.merges": [f"{nul} {nul}"],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
    }
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template
    return metadata


@functools.cache
def byte_tokenizer(size: int = SMALLEST, chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """The tokenizer of `byte_vocabulary`: kvarn's real one, so that its whole API works."""
    return load_tokenizer(MemoryFiles(byte_vocabulary(size, chat_template)))
