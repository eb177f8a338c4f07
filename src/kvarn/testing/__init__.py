"""Helpers for tests only: tiny random models, in memory or as files, and a tokenizer of bytes."""

from kvarn.testing.models import TinyModel, random_tensor, tiny_model

__all__ = ["TinyModel", "random_tensor", "tiny_model"]
