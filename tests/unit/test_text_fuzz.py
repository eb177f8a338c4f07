"""Whatever a file's metadata hold, loading and using a tokenizer works or ends in one of kvarn's errors."""

from contextlib import suppress

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vocabularies import byte_level, sentencepiece, tokenizer

from kvarn.errors import KvarnError, ModelFileError

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.integers(-2, 9), max_size=6),
    st.lists(st.sampled_from(["a", "b", "a b", "b a", "ab", "", " ", "▁", "<0x41>", "</s>", "a  b", "é"]), max_size=8),
    st.lists(st.floats(), max_size=6),
    st.lists(st.lists(st.text(max_size=2), max_size=2), max_size=2),
)
BASES = {"bytes": byte_level([(b"a", b"b")]), "spaces": sentencepiece({"a": -1.0, "▁a": -2.0})}
KEYS = sorted({key for base in BASES.values() for key in base} | {"tokenizer.ggml.add_bos_token", "tokenizer.ggml.pre"})


@given(
    st.sampled_from(sorted(BASES)),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
    st.text(max_size=10),
    st.one_of(st.just("{{ messages[0].content }}"), st.text("{}%|'ab0.[]() ", max_size=12)),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_odd_metadata(base, changes, text, template):
    with suppress(KvarnError):
        subject = tokenizer(BASES[base] | changes, default=template)
        ids = subject.encode(text, add_special_tokens=True, parse_special=True)
        subject.decode([*ids, 0, subject.vocab_size - 1])
        subject.encode_chat([{"role": "user", "content": text}])


@given(st.lists(st.text("abĠ <|>", max_size=3), max_size=12), st.lists(st.text("abĠ", max_size=4), max_size=8))
@settings(max_examples=300)
def test_odd_vocabularies(tokens, merges):
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
    metadata = {key: value for key, value in byte_level().items() if not key.endswith(("_type", "_id"))}
    with suppress(ModelFileError):
        subject = tokenizer(metadata | changes)
        subject.decode(subject.encode("ab a<|>b"))
