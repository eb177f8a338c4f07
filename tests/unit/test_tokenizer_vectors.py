"""Token ids agree with the published vectors of real vocabularies, and long text with itself."""

import pytest

from kvarn.text import load_tokenizer
from kvarn.weights import open_model

SEPARATOR = "\n__ggml_vocab_test__\n"
VOCABULARIES = ["gpt-2", "phi-3", "qwen2"]


@pytest.fixture(scope="module", params=VOCABULARIES)
def vectors(request, test_data):
    path = test_data / "tokenizer_vectors" / f"ggml-vocab-{request.param}.gguf"
    with open_model(path) as files:
        tokenizer = load_tokenizer(files)
    cases = path.with_suffix(".gguf.inp").read_bytes().decode().split(SEPARATOR)
    assert cases.pop() == ""
    lines = path.with_suffix(".gguf.out").read_text().split("\n")[: len(cases)]
    return tokenizer, [
        (case, [int(number) for number in line.split()]) for case, line in zip(cases, lines, strict=True)
    ]


def test_every_case(vectors):
    tokenizer, cases = vectors
    assert len(cases) == 46
    wrong = [(case, ids, tokenizer.encode(case)) for case, ids in cases if tokenizer.encode(case) != ids]
    assert wrong == []


def test_decoding_gives_the_text_back(vectors):
    tokenizer, cases = vectors
    assert [tokenizer.decode(ids) for _, ids in cases] == [case for case, _ in cases]


def test_a_long_text_comes_back(vectors, test_data):
    tokenizer, _ = vectors
    text = (test_data / "wikitext2" / "wiki.test.raw").read_text()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text) / 3
