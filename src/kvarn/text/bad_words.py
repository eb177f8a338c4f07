"""`token_sequences`: the token sequences that a forbidden word may come as."""

from __future__ import annotations

from collections.abc import Iterable

from kvarn.text.tokenizer import Tokenizer


def token_sequences(tokenizer: Tokenizer, words: Iterable[str | tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Of each text its tokens, and those of it after a space where they do not end with the former; ids as they are.

    Each once. Spaces that a text begins with do not count: it is forbidden with and without them, as vLLM has it.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if isinstance(word, str):
            bare = word.lstrip() or word
            plain, spaced = (tuple(tokenizer.encode(text)) for text in (bare, f" {bare}"))
            found[plain] = None
            if spaced[-len(plain) :] != plain:
                found[spaced] = None
        else:
            found[word] = None
    found.pop((), None)
    return tuple(found)
