"""Text as it comes: whole code points, nothing lost, stop strings wherever tokens end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import byte_level, sentencepiece, tokenizer

from kvarn.errors import RequestError
from kvarn.text import IncrementalDetokenizer
from kvarn.text.stops import StopMatcher

BYTES = tokenizer(byte_level([(b"\xf0", b"\x9f"), (b"\x98", b"\x80"), (b"a", b"b"), (b" ", b"a")], defined=["<b>"]))
SPACES = tokenizer(sentencepiece({"▁": -1.0, "▁a": -1.0, "a": -1.0, "é": -2.0, "😀": -3.0}, defined=["<b>", "▁▁"]))
TOKENIZERS = {"bytes": BYTES, "spaces": SPACES}

tokens = st.sampled_from(["bytes", "spaces"]).flatmap(
    lambda kind: st.tuples(st.just(kind), st.lists(st.integers(0, TOKENIZERS[kind].vocab_size + 2), max_size=30))
)


def pieces(subject, ids, **options):
    detokenizer = IncrementalDetokenizer(subject, **options)
    shown = [detokenizer.append(token) for token in ids]
    shown.append(detokenizer.finish())
    assert detokenizer.text == "".join(shown)
    return shown, detokenizer


@given(tokens, st.booleans())
def test_pieces_join_to_the_decoded_whole(kind_and_ids, skip_special):
    kind, ids = kind_and_ids
    subject = TOKENIZERS[kind]
    shown, _ = pieces(subject, ids, skip_special_tokens=skip_special)
    assert "".join(shown) == subject.decode(ids, skip_special_tokens=skip_special)


@given(tokens, st.integers(0, 30))
def test_after_a_prompt_the_text_goes_on(kind_and_ids, cut):
    """The prompt's text and the pieces are the text of all, save for a code point that the prompt left unfinished."""
    kind, ids = kind_and_ids
    subject = TOKENIZERS[kind]
    prompt, rest = ids[:cut], ids[cut:]
    prompt_text, whole = subject.decode(prompt), subject.decode(ids)
    shown, _ = pieces(subject, rest, prompt_ids=prompt)
    assert whole.endswith("".join(shown))
    assert len(whole) - len("".join(shown)) in (len(prompt_text), len(prompt_text) - 1)


def test_no_broken_code_point_is_shown():
    ids = BYTES.encode("a😀é")
    shown, _ = pieces(BYTES, ids)
    assert [text for text in shown if text] == ["a", "😀", "é"]
    assert all("\ufffd" not in text for text in shown)
    cut, _ = pieces(BYTES, ids[:2])
    assert cut == ["a", "", "\ufffd"]


def test_a_code_point_begun_in_the_prompt_is_finished():
    ids = BYTES.encode("😀!")
    shown, _ = pieces(BYTES, ids[1:], prompt_ids=ids[:1])
    assert "".join(shown) == "😀!"


def test_leading_space_is_the_vocabularys_at_the_beginning_and_the_models_after_a_prompt():
    ids = SPACES.encode("a a")
    assert "".join(pieces(SPACES, ids)[0]) == "a a"
    assert "".join(pieces(SPACES, ids, prompt_ids=SPACES.encode("a"))[0]) == " a a"
    assert "".join(pieces(SPACES, ids, prompt_ids=[SPACES.bos_token_id])[0]) == "a a"


def test_special_tokens():
    ids = [*BYTES.encode("a"), *BYTES.eos_token_ids]
    assert "".join(pieces(BYTES, ids)[0]) == "a"
    assert "".join(pieces(BYTES, ids, skip_special_tokens=False)[0]).startswith("a</s>")
    with pytest.raises(RequestError):
        IncrementalDetokenizer(BYTES).append(-1)


def first_completed(text, stops):
    """Where the text ends and why, reading it character by character."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return end, max(done, key=len)
    return None


@given(
    st.text("ab<", max_size=30),
    st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(1, 5), max_size=30),
    st.booleans(),
)
def test_stops_do_not_depend_on_where_tokens_end(text, stops, sizes, include):
    parts = {text[i : i + n] for i in range(len(text)) for n in range(2, 6)}
    subject = tokenizer(byte_level(defined=sorted(part for part in parts if len(part) > 1)))
    ids, at = [], 0
    while at < len(text):
        size = sizes.pop() if sizes else 1
        ids += subject.encode(text[at : at + size])
        at += size
    _, detokenizer = pieces(subject, ids, stop=stops, include_stop=include)
    expected = first_completed(text, stops)
    if expected is None:
        assert (detokenizer.text, detokenizer.stop_reason) == (text, None)
    else:
        end, stop = expected
        assert detokenizer.stop_reason == stop
        assert detokenizer.text == text[: end if include else end - len(stop)]


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_holds_back_only_what_may_begin_a_stop_string(text, stops):
    detokenizer = IncrementalDetokenizer(BYTES, stop=stops)
    for end, character in enumerate(text, 1):
        detokenizer.append(BYTES.encode(character)[0])
        if detokenizer.stop_reason is not None:
            return
        held = end - len(detokenizer.text)
        longest = max(n for n in range(end + 1) if any(s[:n] == text[end - n : end] and n < len(s) for s in stops))
        assert held == longest


def test_nothing_more_after_a_stop():
    detokenizer = IncrementalDetokenizer(BYTES, stop=["b"])
    assert [detokenizer.append(BYTES.encode(c)[0]) for c in "abc"] == ["a", "", ""]
    assert (detokenizer.finish(), detokenizer.text, detokenizer.stop_reason) == ("", "a", "b")


def test_stop_strings_do_not_count_before_min_tokens():
    detokenizer = IncrementalDetokenizer(BYTES, stop=["bb", "x"], min_tokens=3)
    shown = [detokenizer.append(BYTES.encode(c)[0]) for c in "xbbbbc"]
    assert shown == ["x", "b", "b", "", "", ""]
    assert detokenizer.stop_reason == "bb"


def test_a_stop_string_can_be_completed_by_the_end():
    detokenizer = IncrementalDetokenizer(BYTES, stop=["\ufffd"], include_stop=True)
    detokenizer.append(BYTES.encode("é")[0])
    assert (detokenizer.finish(), detokenizer.stop_reason) == ("\ufffd", "\ufffd")


def test_matching_is_linear_in_the_text():
    """The automaton never looks at a character twice, however often stop strings nearly match."""

    class Counted(str):
        __slots__ = ()
        reads = 0

        def __iter__(self):
            for character in super().__iter__():
                Counted.reads += 1
                yield character

    matcher = StopMatcher(["a" * 1000 + "b"])
    assert matcher.feed(Counted("a" * 10_000)) is None
    assert (Counted.reads, matcher.pending) == (10_000, 1000)
