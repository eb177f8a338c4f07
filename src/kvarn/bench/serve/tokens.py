"""How many tokens a text has for a server whose tokenizer nobody here knows: asked with two short prompts."""

from __future__ import annotations

from dataclasses import dataclass

PROBE_WORDS = (12, 60)


@dataclass(frozen=True, slots=True)
class TokenScale:
    """Tokens of a prompt as a line over its words: what the server counts for a word, and adds to each prompt."""

    per_word: float = 1.3
    """Where a server does not say: about what English has with common tokenizers."""
    overhead: float = 0.0
    measured: bool = False

    @staticmethod
    def through(words: tuple[int, int], tokens: tuple[int, int]) -> TokenScale:
        """The line through two prompts' words and tokens; that of English where they make none."""
        slope = (tokens[1] - tokens[0]) / (words[1] - words[0])
        if slope <= 0:
            return TokenScale()
        return TokenScale(slope, max(0.0, tokens[0] - slope * words[0]), measured=True)

    def words(self, tokens: float, *, overhead: bool = True) -> int:
        """Words of a prompt of so many tokens, at least 1. overhead: with what the server adds to each prompt."""
        return max(1, round((tokens - (self.overhead if overhead else 0.0)) / self.per_word))

    def tokens(self, text: str, *, overhead: bool = True) -> int:
        """Tokens of a text, at least 1."""
        return max(1, round(len(text.split()) * self.per_word + (self.overhead if overhead else 0.0)))
