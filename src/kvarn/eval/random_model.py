"""A tiny model of random weights, which says anything: what tests what does not depend on a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvarn.models import program_from_config
from kvarn.models.in_memory import InMemoryModel
from kvarn.tensors import Tensor
from kvarn.text import Tokenizer
from kvarn.text.packed_texts import PackedTexts
from kvarn.text.vocabulary import Pieces, Vocabulary, byte_of_character

END = 256
"""The token of `byte_tokenizer` that ends a text."""


def random_model(vocab_size: int, length: int, ends: Sequence[int], seed: int = 0) -> InMemoryModel:
    """length: of its longest text, in tokens. ends: tokens that end one."""
    settings: dict[str, Any] = {
        "model_type": "llama", "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": length, "eos_token_id": list(ends),
    }  # fmt: skip
    config, program = program_from_config(settings, "hf")
    rng = np.random.default_rng(seed)

    def values(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return Tensor.from_array(np.ones(shape, np.float32))
        scale = 1.0 if "embed" in name else shape[-1] ** -0.5
        return Tensor.from_array((rng.standard_normal(shape) * scale).astype(np.float32))

    return InMemoryModel(config, program, {w.name: values(w.name, w.shape) for w in program.weights})


def byte_tokenizer() -> Tokenizer:
    """A vocabulary of the 256 bytes and `END`."""
    characters = {byte: character for character, byte in byte_of_character().items()}
    tokens = [*(characters[byte] for byte in range(256)), "<end>"]
    special = frozenset({END})
    return Tokenizer(
        Vocabulary(
            PackedTexts(tokens), Pieces.BYTES, _Bytes(), special=special, verbatim=special, byte_tokens=frozenset(),
            padding=frozenset(), bos=None, eos=(END,), add_bos=False, add_eos=False, space_prefix=False,
        )
    )  # fmt: skip


class _Bytes:
    def encode(self, text: str, *, parse_special: bool, literal: Sequence[tuple[int, int]] = ()) -> list[int]:
        """A token for each byte."""
        del parse_special, literal
        return list(text.encode())
