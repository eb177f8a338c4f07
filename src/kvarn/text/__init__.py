"""Text to tokens and back: vocabularies, chat templates, incremental detokenizing with stop strings."""

from kvarn.text.bad_words import token_sequences
from kvarn.text.detokenizer import IncrementalDetokenizer
from kvarn.text.tokenizer import Tokenizer, load_spellings, load_tokenizer, spellings

__all__ = ["IncrementalDetokenizer", "Tokenizer", "load_spellings", "load_tokenizer", "spellings", "token_sequences"]
