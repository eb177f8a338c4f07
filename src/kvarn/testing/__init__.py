"""Helpers for tests only: tiny random models, in memory or as files, and a vocabulary of bytes."""

from kvarn.testing.files import MemoryFiles
from kvarn.testing.gguf import tiny_gguf, write_gguf, write_tiny_gguf
from kvarn.testing.models import random_tensor, random_weight, tiny_model
from kvarn.testing.vocabulary import byte_tokenizer, byte_vocabulary

__all__ = [
    "MemoryFiles",
    "byte_tokenizer",
    "byte_vocabulary",
    "random_tensor",
    "random_weight",
    "tiny_gguf",
    "tiny_model",
    "write_gguf",
    "write_tiny_gguf",
]
