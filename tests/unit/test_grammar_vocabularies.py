"""Grammars hold for every kind of vocabulary: bytes and SentencePiece, from GGUF and from tokenizer.json."""

import random

import numpy as np
import pytest
from test_tokenizer_hf import byte_level_core, metaspace_core, save
from vocabularies import byte_level, sentencepiece, tokenizer

from kvarn.engine.load import grammar_vocabulary
from kvarn.grammar.source import to_llguidance
from kvarn.grammar.vocabulary import new_matcher
from kvarn.request import Grammar
from kvarn.text import load_tokenizer

MERGES = [(b" ", b"t"), (b"h", b"e"), (b" t", b"he"), (b"\xc3", b"\xbc")]
SCORES = {"▁": -9.0, "t": -9.0, "h": -9.0, "e": -9.0, "he": -2.0, "▁t": -2.0, "▁the": -1.0, "ü": -3.0, "</s": -3.0}
TEXTS = ["the Zürich <think> 😀", "the other</s>", " the"]
PADDING = 5
"""Rows of logits beyond the vocabulary."""


def gguf_bytes(_path):
    return tokenizer(byte_level(MERGES, defined=["<think>"]))


def gguf_spaces(_path):
    return tokenizer(sentencepiece(SCORES, defined=["<think>"], add_space_prefix=False))


def gguf_spaces_with_prefix(_path):
    return tokenizer(sentencepiece(SCORES, defined=["<think>"], add_space_prefix=True))


def hf_bytes(path):
    return load_tokenizer(save(byte_level_core(), path))


def hf_spaces(path):
    return load_tokenizer(save(metaspace_core(), path))


@pytest.fixture(params=[gguf_bytes, gguf_spaces, gguf_spaces_with_prefix, hf_bytes, hf_spaces],
                ids=lambda make: make.__name__)  # fmt: skip
def words(request, tmp_path):
    return request.param(tmp_path)


def allowed(matcher):
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()


def test_whatever_is_chosen_the_text_is_what_the_grammar_says(words):
    vocabulary = grammar_vocabulary(words, words.vocab_size + PADDING, words.eos_token_ids)
    tokens = vocabulary.to_llguidance()
    source, chance, said, tokenizations = to_llguidance(Grammar.choice(TEXTS)), random.Random(1), set(), set()
    for _ in range(60):
        matcher, ids = new_matcher(tokens, source), []
        while (token := chance.choice(allowed(matcher))) not in words.eos_token_ids:
            assert token < words.vocab_size
            assert not words.is_special(token)
            assert words.token_bytes(token)
            ids.append(token)
            assert matcher.consume_token(token)
        said.add(b"".join(words.token_bytes(token) for token in ids).decode())
        tokenizations.add(tuple(ids))
    assert said == set(TEXTS)
    assert len(tokenizations) >= len(TEXTS)


def test_what_is_forced_is_what_the_model_would_write(words):
    vocabulary = grammar_vocabulary(words, words.vocab_size, words.eos_token_ids)
    matcher = new_matcher(vocabulary.to_llguidance(), to_llguidance(Grammar.choice(["the Zürich 1", "the Zürich 2"])))
    forced = matcher.compute_ff_tokens()
    text = b"".join(words.token_bytes(token) for token in forced).decode()
    assert "the Zürich ".startswith(text) and len(text) > 5
    if not words.strips_leading_space:
        assert forced == words.encode("the Zürich 1")[: len(forced)]
    while not matcher.is_stopped():
        one = allowed(matcher)
        assert not forced or one == forced[:1]
        matcher.consume_token((forced or one)[0])
        forced = matcher.compute_ff_tokens()
