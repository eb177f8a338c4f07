"""Byte-level BPE: how text is cut into words, and what bad metadata give."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from vocabularies import UNUSED, byte_level, texts, tokenizer

from kvarn.errors import ModelFileError, RequestError, UnsupportedModelError
from kvarn.text.pretokenizers import PRE_TOKENIZERS

MIXED = st.text(
    st.one_of(
        st.sampled_from(list("aZ 09\n\r\t'’.,$+<=>^~|`_-!/éßЖя中文かナ한ไ्٣Ⅷ½🚀\u200d\ufe0f\u3000\u00a0\u2028")),
        st.characters(exclude_categories=["Cs", "Cn"]),
    ),
    max_size=30,
)


DISTINCT = sorted({kind.patterns: name for name, kind in PRE_TOKENIZERS.items()}.values())
"""One name of each kind."""


def words(kind, text):
    """The words that a kind cuts text into, as text."""
    pieces = PRE_TOKENIZERS[kind].build().pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in pieces]


@pytest.mark.parametrize("kind", DISTINCT)
@given(text=MIXED)
@settings(max_examples=30)
def test_no_kind_loses_text(kind, text):
    assert "".join(words(kind, text)) == text


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        # Digits: as they come, one by one, in threes from the left, in threes from the right.
        ("gpt-2", "x 12345", ["x", " 12345"]),
        ("qwen2", "x 12345", ["x", " ", "1", "2", "3", "4", "5"]),
        ("starcoder", "x 12345", ["x", " ", "1", "2", "3", "4", "5"]),
        ("llama-bpe", "x 12345", ["x", " ", "123", "45"]),
        ("deepseek-v3", "x 12345", ["x", " ", "123", "45"]),
        ("falcon", "x 12345", ["x", " ", "123", "45"]),
        ("default", "x 12345", ["x", " ", "123", "45"]),
        ("afmoe", "12345 1234567x", ["12", "345", " ", "1", "234", "567", "x"]),
        ("tiny_aya", "12345 1234567x", ["12", "345", " ", "123", "456", "7", "x"]),
        # Contractions: lower case only, or any case; part of the word before in later kinds.
        ("gpt-2", "We've HE'S", ["We", "'ve", " HE", "'", "S"]),
        ("llama-bpe", "We've HE'S", ["We", "'ve", " HE", "'S"]),
        ("gpt-4o", "We've HE'S", ["We've", " HE'S"]),
        # Words: the character before the letters, and changes of case.
        ("gpt-2", "(word) camelCase", ["(", "word", ")", " camelCase"]),
        ("qwen2", "(word) camelCase", ["(word", ")", " camelCase"]),
        ("tekken", "(word) camelCase", ["(word", ")", " camel", "Case"]),
        ("gpt-4o", "ÉtéÉTÉ", ["Été", "ÉTÉ"]),
        # Lines and spaces.
        ("gpt-2", "a  b\n\n  c", ["a", " ", " b", "\n\n ", " c"]),
        ("qwen2", "a  b\n\n  c", ["a", " ", " b", "\n\n", " ", " c"]),
        ("qwen2", "a!\n\nb", ["a", "!\n\n", "b"]),
        ("deepseek-coder", "a\n\nb", ["a", "\n", "\n", "b"]),
        ("seed-coder", "a!\n\nb", ["a", "!", "\n\n", "b"]),
        # Punctuation and other scripts.
        ("falcon", "a.b`c $1", ["a", ".", "b", "`", "c", " ", "$", "1"]),
        ("bloom", "Hello, world! (x)", ["Hello", ",", " world", "! (", "x", ")"]),
        ("deepseek-llm", "abcдеж中文字1", ["abc", "деж", "中文字", "1"]),
        ("deepseek-v3", "ab中文cd", ["ab", "中文", "cd"]),
        ("kimi-k2", "ab中文cd", ["ab", "中文", "cd"]),
    ],
)
def test_words(kind, text, expected):
    assert words(kind, text) == expected


@pytest.mark.parametrize("kind", ["gpt-2", "starcoder"])
@given(text=MIXED)
def test_agrees_with_the_librarys_own_parts(kind, text):
    """tokenizer.json of these models names ready-made parts instead of patterns."""
    byte_level_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    parts = {
        "gpt-2": byte_level_words,
        "starcoder": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level_words]),
    }
    expected = [piece for piece, _ in parts[kind].pre_tokenize_str(text)]
    assert [piece for piece, _ in PRE_TOKENIZERS[kind].build().pre_tokenize_str(text)] == expected


@given(text=MIXED.filter(lambda text: not any(character.isnumeric() for character in text)))
def test_falcon_agrees_with_the_librarys_own_parts(text):
    """Its parts cut off the space before a number too, which no merge of the vocabulary undoes."""
    library = pre_tokenizers.Sequence([
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ])  # fmt: skip
    expected = [piece for piece, _ in library.pre_tokenize_str(text)]
    assert [piece for piece, _ in PRE_TOKENIZERS["falcon"].build().pre_tokenize_str(text)] == expected


@pytest.mark.parametrize(
    ("kind", "literal"),
    [
        ("tiny_aya", r"\d{1,3}(?=(?:\d{3})*\b)"),
        ("afmoe", r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"),
        ("deepseek-llm", r"\s+$"),
    ],
)
@given(text=st.text("12٣½a \t中_-", max_size=30))
def test_linear_patterns_find_what_the_files_own_do(kind, literal, text):
    patterns = PRE_TOKENIZERS[kind].patterns
    (ours,) = (pattern for pattern in patterns if "(?<!" in pattern)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (ours, literal)]
    assert split[0].pre_tokenize_str(text) == split[1].pre_tokenize_str(text)


@pytest.mark.parametrize("kind", DISTINCT)
def test_long_runs_take_no_quadratic_time(kind):
    """A pattern that looks at all of a run from each of its places would take minutes here."""
    for text in (" " * 100_000 + "中", "1" * 100_000 + "a", "A" * 100_000, "½1" * 50_000, "'" * 100_000):
        assert "".join(words(kind, text)) == text


def test_merges_in_order_of_rank():
    merges = [(b"h", b"e"), (b"l", b"l"), (b"he", b"ll"), (b"hell", b"o"), (b"l", b"o")]
    subject = tokenizer(byte_level(merges))
    assert texts(subject, subject.encode("hello helo")) == ["hello", "Ġ", "he", "lo"]


def test_ignore_merges_takes_a_whole_word_first():
    merges = [(b"a", b"b"), (b"c", b"d"), (b"b", b"c"), (b"a", b"bc"), (b"abc", b"d")]
    merged = tokenizer(byte_level(merges))
    assert texts(merged, merged.encode("abcd")) == ["ab", "cd"]
    whole = tokenizer(byte_level(merges, pre="llama-bpe"))
    assert texts(whole, whole.encode("abcd")) == ["abcd"]
    assert texts(whole, whole.encode("x", add_special_tokens=True)) == ["<s>", "x"]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(text):
    merges = [(b"a", b"b"), (b"\xf0", b"\x9f"), (b"\xf0\x9f", b"\x98"), (b" ", b" ")]
    for pre in ("gpt-2", "qwen2", "deepseek-v3"):
        subject = tokenizer(byte_level(merges, pre=pre))
        assert subject.decode(subject.encode(text)) == text


def test_lone_surrogates_become_replacement_characters():
    subject = tokenizer(byte_level())
    assert subject.decode(subject.encode("a\ud83dé")) == "a\ufffdé"
    assert subject.encode("\ud83d\ude00") == subject.encode("😀")


def test_a_byte_without_a_token_is_left_out():
    metadata = byte_level([(b")", b",")])
    metadata["tokenizer.ggml.tokens"][0x1D] = "[none]"
    subject = tokenizer(metadata)
    assert texts(subject, subject.encode(")\x1d,")) == [")", ","]
    assert texts(subject, subject.encode("),")) == ["),"]


def test_padding_has_no_text():
    metadata = byte_level()
    metadata["tokenizer.ggml.tokens"].append("[PAD300]")
    metadata["tokenizer.ggml.token_type"].append(UNUSED)
    subject = tokenizer(metadata)
    last = subject.vocab_size - 1
    assert subject.decode([last, subject.encode("a")[0], last + 5]) == "a"
    with pytest.raises(RequestError, match="at least 0"):
        subject.token_bytes(-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": []}, "tokens: is empty"),
        ({"tokens": None}, "tokens: is missing"),
        ({"tokens": ["a", 1]}, "tokens: must be an array of str"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "'a' appears twice, as 0 and 2"),
        ({"token_type": [1]}, "token_type: has 1 entries"),
        ({"token_type": [9] * 260}, "type 9, which does not exist"),
        ({"merges": None}, "merges: is missing"),
        ({"merges": ["ab"]}, "entry 0, 'ab', is no pair"),
        ({"merges": ["a b c"]}, "is no pair"),
        ({"merges": ["a nothing"]}, "merges: .*nothing"),
        ({"eos_token_id": 9999}, "eos_token_id: must be a token id below"),
        ({"bos_token_id": "x"}, "bos_token_id: must be a token id below"),
        ({"add_bos_token": 3}, "add_bos_token: must be true or false"),
        ({"pre": 7}, "pre: must be text"),
        ({"model": None}, "has no tokenizer"),
    ],
)
def test_bad_metadata_are_named(change, message):
    metadata = byte_level()
    for key, value in change.items():
        metadata.pop(f"tokenizer.ggml.{key}", None)
        if value is not None:
            metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(ModelFileError, match=message):
        tokenizer(metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "from-the-future"}, "'from-the-future' is not known"),
        ({"model": "bert"}, "WordPiece"),
        ({"model": "t5"}, "Unigram"),
        ({"model": "odd"}, "'odd' is not supported"),
    ],
)
def test_other_kinds_are_refused_by_name(change, message):
    metadata = byte_level() | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(UnsupportedModelError, match=message):
        tokenizer(metadata)


def test_no_such_token_in_32_bits():
    subject = tokenizer(byte_level(bos_token_id=0xFFFFFFFF))
    assert subject.bos_token_id is None
    assert subject.encode("", add_special_tokens=True) == []
