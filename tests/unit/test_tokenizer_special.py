"""Special tokens in text: found where they should be, and only there."""

from hypothesis import given
from hypothesis import strategies as st
from vocabularies import byte_level, texts, tokenizer

from kvarn.text.special import TokenFinder


def by_definition(text, ids, blocked):
    """Leftmost, then longest, in the most literal way."""
    found, position = [], 0
    while position < len(text):
        here = [t for t in ids if text.startswith(t, position) and not blocked(t, position, position + len(t))]
        if here:
            best = max(here, key=len)
            found.append((position, position + len(best), ids[best]))
            position += len(best)
        else:
            position += 1
    return found


@given(st.sets(st.text("<|ab>", min_size=1, max_size=4), max_size=8), st.text("<|ab>c", max_size=30))
def test_finds_leftmost_then_longest(tokens, text):
    ids = {token: number for number, token in enumerate(sorted(tokens))}
    assert list(TokenFinder(ids, {}).find(text)) == by_definition(text, ids, lambda *_: False)


@given(
    st.sets(st.text("<|ab>", min_size=1, max_size=4), min_size=1, max_size=8),
    st.text("<|ab>c", max_size=30),
    st.sets(st.integers(0, 30), max_size=4),
)
def test_literal_spans_hold_no_control_token(tokens, text, starts):
    ids = {token: number for number, token in enumerate(sorted(tokens))}
    control = {token: number for token, number in ids.items() if number % 2 == 0}
    defined = {token: number for token, number in ids.items() if number % 2}
    literal = [(s, s + 1) for s in sorted(starts) if s < len(text)]

    def blocked(token, start, end):
        return token in control and any(start < e and s < end for s, e in literal)

    assert list(TokenFinder(control, defined).find(text, literal)) == by_definition(text, ids, blocked)


def test_special_tokens_in_text_are_text_unless_asked():
    subject = tokenizer(byte_level())
    plain = subject.encode("a<|im_end|>b")
    assert not any(subject.is_special(token) for token in plain)
    assert subject.decode(plain) == "a<|im_end|>b"
    parsed = subject.encode("a<|im_end|>b", parse_special=True)
    assert texts(subject, parsed) == ["a", "<|im_end|>", "b"]
    assert subject.decode(parsed) == "ab"
    assert subject.decode(parsed, skip_special_tokens=False) == "a<|im_end|>b"


def test_user_defined_tokens_are_matched_without_asking():
    subject = tokenizer(byte_level(defined=["  ", "    ", "<think>"]))
    assert texts(subject, subject.encode("     <think>")) == ["    ", "Ġ", "<think>"]
    assert subject.decode(subject.encode("     <think>")) == "     <think>"


def test_end_of_turn_tokens_are_special_whatever_their_type():
    """Converters have marked them as ordinary or user-defined tokens."""
    subject = tokenizer(byte_level(control=["<s>", "</s>"], defined=["<|im_end|>", "<|eot_id|>", "<|im_start|>"]))
    ends = {subject.token_text(token) for token in subject.eos_token_ids}
    assert ends == {"</s>", "<|im_end|>", "<|eot_id|>"}
    assert not any(subject.is_special(token) for token in subject.encode("<|im_end|>"))
    assert texts(subject, subject.encode("<|im_start|>")) == ["<|im_start|>"]


def test_end_marks_only_a_part_in_harmony_vocabularies():
    subject = tokenizer(byte_level(control=["<|end|>", "<|return|>", "<|call|>"]))
    assert {subject.token_text(token) for token in subject.eos_token_ids} == {"<|return|>", "<|call|>"}


def test_a_word_that_spells_a_special_token_does_not_become_it():
    """With ignore_merges a whole word is looked up first."""
    subject = tokenizer(byte_level(control=["word", "<s>"], pre="llama-bpe"))
    assert subject.encode("word") == subject.encode("w") + subject.encode("ord")
    assert texts(subject, subject.encode("word", parse_special=True)) == ["word"]
