"""SentencePiece's BPE against its definition, read literally."""

from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models
from vocabularies import sentencepiece, texts, tokenizer

from kvarn.errors import ModelFileError

CHARACTERS = "ab▁\né"


def by_definition(text: str, scores: dict[str, float]) -> list[str]:
    """Again and again join the adjacent pair whose joint token has the best score, the leftmost of equals."""
    symbols = list(text)
    while True:
        joint = [
            (-scores[left + right], index)
            for index, (left, right) in enumerate(pairwise(symbols))
            if left + right in scores
        ]
        if not joint:
            return symbols
        index = min(joint)[1]
        symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]


@st.composite
def vocabularies(draw):
    tokens = draw(st.lists(st.text(CHARACTERS, min_size=1, max_size=5), max_size=20, unique=True))
    return {token: float(draw(st.integers(-6, 0))) for token in tokens}


@given(vocabularies(), st.text(CHARACTERS.replace("▁", " "), max_size=40))
@settings(max_examples=300)
def test_joins_as_defined(scores, text):
    subject = tokenizer(sentencepiece(scores, add_space_prefix=False))
    expected = []
    for symbol in by_definition(text.replace(" ", "▁"), scores):
        expected += [symbol] if symbol in scores else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    assert texts(subject, subject.encode(text)) == expected


@pytest.mark.parametrize("joined", ["▁▁", "a▁", "▁▁▁a", "a▁a▁a"])
def test_tokens_with_spaces_inside(joined):
    """Where some token has a space inside, words are not encoded apart."""
    scores = {joined[:size]: -float(size) for size in range(1, len(joined) + 1)} | {"a": -9.0, "▁": -9.0}
    subject = tokenizer(sentencepiece(scores, add_space_prefix=False))
    for text in (joined, f"x{joined}", f"a{joined}{joined}", joined * 9):
        expected = [part if part in scores else "<0x78>" for part in by_definition(text, scores)]
        assert texts(subject, subject.encode(text.replace("▁", " "))) == expected


@given(vocabularies(), st.text(max_size=30))
def test_decoding_gives_any_text_back(scores, text):
    for space_prefix in (False, True):
        subject = tokenizer(sentencepiece(scores | {"▁": -9.0}, add_space_prefix=space_prefix))
        kept = text.replace("▁", " ")  # the two are one and the same to such a vocabulary
        assert subject.decode(subject.encode(kept)) == kept


def test_no_ranking_of_pairs_expresses_it():
    """The leftmost of equal joins wins, whichever pair it is: the reason for our own code."""
    expected = {"abc": ["ab", "c"], "bca": ["bc", "a"], "cab": ["ca", "b"]}
    scores = dict.fromkeys(["a", "b", "c"], -2.0) | dict.fromkeys(["ab", "bc", "ca"], -1.0)
    subject = tokenizer(sentencepiece(scores, add_space_prefix=False))
    assert {text: texts(subject, subject.encode(text)) for text in expected} == expected
    for pairs in permutations([("a", "b"), ("b", "c"), ("c", "a")]):
        library = Library(models.BPE({token: index for index, token in enumerate(scores)}, list(pairs)))
        assert {text: library.encode(text).tokens for text in expected} != expected


def test_neighbours_join_although_they_are_no_tokens():
    subject = tokenizer(sentencepiece({"xy": -1.0}, add_space_prefix=False))
    assert texts(subject, subject.encode("xyx")) == ["xy", "<0x78>"]


def test_control_and_byte_tokens_are_not_spelt_by_text():
    scores = {"<": -1.0, "s": -1.0, ">": -1.0, "<s": -1.0, "<0": -1.0, "<0x41": -1.0, "0": -9.0, "x4": -1.0, "1": -9.0}
    subject = tokenizer(sentencepiece(scores, add_space_prefix=False))
    assert texts(subject, subject.encode("<s>")) == ["<s", ">"]
    assert "<0x41>" not in texts(subject, subject.encode("<0x41>"))
    assert texts(subject, subject.encode("<s>", parse_special=True)) == ["<s>"]


def test_space_prefix_at_the_beginning_and_after_special_tokens():
    subject = tokenizer(sentencepiece({"▁": -5.0, "▁a": -1.0, "a": -9.0}))
    assert texts(subject, subject.encode("a<s>a", parse_special=True)) == ["▁a", "<s>", "▁a"]
    assert texts(subject, subject.encode(" a")) == ["▁", "▁a"]
    assert subject.encode("") == []
    assert subject.decode(subject.encode("a")) == "a"
    assert subject.decode(subject.encode(" a")) == " a"


def test_bos_is_added_unless_the_file_says_otherwise():
    subject = tokenizer(sentencepiece({"a": 0.0}))
    assert texts(subject, subject.encode("", add_special_tokens=True)) == ["<s>"]
    assert texts(subject, subject.encode("<s>a", add_special_tokens=True, parse_special=True)).count("<s>") == 1
    without = tokenizer(sentencepiece({"a": 0.0}, add_bos_token=False, add_eos_token=True))
    assert texts(without, without.encode("a", add_special_tokens=True)) == ["<0xE2>", "<0x96>", "<0x81>", "a", "</s>"]


def test_user_defined_tokens_are_found_in_any_text():
    subject = tokenizer(sentencepiece({"a": 0.0}, defined=["\n", "\n\n", "<b>"], add_space_prefix=False))
    assert texts(subject, subject.encode("a\n\n\n<b>")) == ["a", "\n\n", "\n", "<b>"]
    assert not subject.is_special(subject.encode("<b>")[0])


def test_unknown_characters_without_byte_tokens():
    subject = tokenizer(sentencepiece({"a": 0.0}, all_bytes=False, add_space_prefix=False))
    assert texts(subject, subject.encode("aéa")) == ["a", "<unk>", "a"]


def test_long_words_and_many_words():
    subject = tokenizer(sentencepiece({"a": -9.0, "aa": -3.0, "aaaa": -2.0, "▁": -8.0, "▁a": -1.0}))
    assert texts(subject, subject.encode("a" * 100_001))[:3] == ["▁a", "aaaa", "aaaa"]
    assert subject.decode(subject.encode("a" * 100_001)) == "a" * 100_001
    words = "a aa aaa " * 20_000
    assert subject.decode(subject.encode(words)) == words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": None}, "scores: is missing"),
        ({"scores": [0.0]}, "has 1 entries for"),
        ({"scores": [float("nan")] * 260}, "infinite or no number"),
        ({"add_space_prefix": "yes"}, "add_space_prefix: must be true or false"),
    ],
)
def test_bad_metadata(change, message):
    metadata = sentencepiece({"a": 0.0})
    for key, value in change.items():
        metadata.pop(f"tokenizer.ggml.{key}", None)
        if value is not None:
            metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(ModelFileError, match=message):
        tokenizer(metadata)


def test_neither_bytes_nor_unknown():
    metadata = sentencepiece({"a": 0.0}, all_bytes=False, unknown_token_id=None)
    metadata["tokenizer.ggml.token_type"][0] = 1
    with pytest.raises(ModelFileError, match="neither a token for every byte nor an unknown token"):
        tokenizer(metadata)
