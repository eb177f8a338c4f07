"""kvarn: an LLM inference engine and server.

The way of a request, in the order of the folders:

    server    HTTP to `Request`                      text       template and tokenizer, both ways
    engine    the loop: schedule, execute, update    scheduler  who computes how many tokens in this step
    cache     which blocks hold whose KV             runner     `SchedulerOutput` to arrays, arrays to tokens
    models    a family's config to a `Program`       program    ops, buffers, shapes, counts
    backends  run a program: reference, cpu, null    weights    files to tensors
    sampling  logits to tokens                       grammar    which tokens an answer of a given form may have

`LLM` and `AsyncLLM` are the two ways in; both are imported on first use, so that `import kvarn` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvarn.engine import LLM, AsyncLLM
    from kvarn.request import Grammar, SamplingParams

__all__ = ["LLM", "AsyncLLM", "Grammar", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    if name in ("LLM", "AsyncLLM"):
        # By name: for import-linter, an import written here would let every module of kvarn reach the engine.
        return getattr(importlib.import_module("kvarn.engine"), name)
    if name in ("Grammar", "SamplingParams"):
        return getattr(importlib.import_module("kvarn.request"), name)
    raise AttributeError(f"module 'kvarn' has no attribute {name!r}")
