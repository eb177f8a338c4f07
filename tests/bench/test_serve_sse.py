"""The reader of server-sent events: any cutting of a stream gives the same events."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvarn.bench.serve import sse
from kvarn.bench.serve.sse import SseReader

LINES = st.lists(
    st.sampled_from(
        [b"data: one", b"data:two", b"data:  three", b"data", b"data:", b": comment", b"event: x", b"id: 4", b"", b"",
         b"retry: 5", b"datax: no", b"data: a:b", "data: å¶".encode(), b"data: {\"a\": [1]}"]
    ),
    max_size=12,
)  # fmt: skip
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


def events(pieces):
    reader = SseReader()
    return [event for piece in pieces for event in reader.feed(piece)] + reader.close()


def expected(lines):
    """By the standard, line by line."""
    found, data = [], []
    for line in lines:
        if not line:
            found += [b"\n".join(data)] if data else []
            data = []
        elif line.split(b":")[0] == b"data":
            value = line.partition(b":")[2]
            data.append(value[1:] if value.startswith(b" ") else value)
    return found


@st.composite
def cut_streams(draw):
    lines = draw(LINES)
    text = b"".join(line + draw(ENDS) for line in lines)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=20)))
    return text, [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(cut_streams(), st.booleans())
@example((b"data: x\r\n\r\n", [b"data: x\r", b"\n\r", b"\n"]), False)
def test_any_cutting_gives_the_same_events(cut, with_bom):
    text, pieces = cut
    # A "\r" line end and a "\n" one that follow each other are one end: count lines as the standard does.
    joined = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    bom = b"\xef\xbb\xbf" if with_bom else b""
    assert events([*([bom] if bom else []), *pieces]) == expected(joined)
    assert events([bytes([byte]) for byte in bom + text]) == expected(joined)


def test_an_event_cut_short_is_none():
    assert events([b"data: a\n\ndata: b\n"]) == [b"a"]


def test_an_event_is_there_with_its_last_byte():
    reader = SseReader()
    assert reader.feed(b"data: a\n") == []
    assert reader.feed(b"\n") == [b"a"]


def test_a_line_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(sse, "MAX_LINE_BYTES", 100)
    reader = SseReader()
    reader.feed(b"x" * 60)
    with pytest.raises(ValueError, match="100 bytes"):
        reader.feed(b"x" * 60)
