"""`content_key`: which weights a program has, wherever their file lies. For what was made for one model alone."""

from __future__ import annotations

import hashlib

import numpy as np

from kvarn.program import Program
from kvarn.tensors import Tensor, TensorSource

SAMPLES, SAMPLE_BYTES = 16, 64
"""Stretches of each tensor that are looked at, and their length. Who trains a model on changes all of its weights."""


def content_key(program: Program, weights: TensorSource) -> str:
    """A name for family, vocabulary size and weights: 64 hexadecimal digits.

    Names, shapes and stored types of all weights count, and samples from each: reading a gigabyte would take as long as
    the start. So it tells models apart, also those trained on from one another; it is no proof against who means to
    deceive, and must not decide what is safe.
    """
    digest = hashlib.sha256(f"kvarn content 1\n{program.name}\n{program.vocab_size}\n".encode())
    for weight in sorted(program.weights, key=lambda weight: weight.name):
        tensor = weights.tensor(weight.name)
        digest.update(f"{weight.name} {weight.shape} {tensor.dtype.name}\n".encode())
        digest.update(_samples(tensor))
    return digest.hexdigest()


def _samples(tensor: Tensor) -> bytes:
    if tensor.nbytes <= SAMPLES * SAMPLE_BYTES:
        return tensor.data.tobytes()
    starts = np.linspace(0, tensor.nbytes - SAMPLE_BYTES, SAMPLES).astype(np.int64)
    return b"".join(tensor.data[start : start + SAMPLE_BYTES].tobytes() for start in starts.tolist())
