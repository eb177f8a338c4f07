"""String arrays of GGUF files against the obvious loop, on any bytes."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.weights import strings
from kvarn.weights.strings import StringsError, decode_strings, find_strings

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "\0", "\0" * 7, "\0" * 8, "\1" + "\0" * 7, "é" * 127, "é" * 128, "x" * 255, "x" * 256, "▁the"]
    ),
)


def packed(texts):
    return b"".join(struct.pack("<Q", len(t)) + t for t in texts)


def walked(data, start, count):
    starts, position = [], start
    for index in range(count):
        if position + 8 > len(data):
            return index
        starts.append(position)
        position += 8 + struct.unpack_from("<Q", data, position)[0]
        if position > len(data):
            return index
    return starts, position


@given(texts=st.lists(TEXTS, max_size=300), before=st.binary(max_size=9), after=st.binary(max_size=40))
def test_strings_come_back(texts, before, after):
    block = packed([t.encode() for t in texts])
    data = memoryview(before + block + after)
    starts, end = find_strings(data, len(before), len(texts))
    assert end == len(before) + len(block)
    assert decode_strings(data, starts, end) == texts


@given(texts=st.lists(TEXTS, min_size=1, max_size=40), data=st.data())
def test_damaged_arrays_are_found_out_like_by_the_loop(texts, data):
    block = bytearray(packed([t.encode() for t in texts]))
    for _ in range(data.draw(st.integers(1, 3))):
        block[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.sampled_from([0, 1, 7, 8, 255]))
    del block[data.draw(st.integers(0, len(block))) :]
    expected = walked(block, 0, len(texts))
    view = memoryview(bytes(block))
    if isinstance(expected, int):
        with pytest.raises(StringsError) as caught:
            find_strings(view, 0, len(texts))
        assert caught.value.index == expected
        return
    starts, end = find_strings(view, 0, len(texts))
    assert (starts.tolist(), end) == expected
    pieces = [bytes(block[a + 8 : b]) for a, b in zip(starts.tolist(), [*starts.tolist()[1:], end], strict=True)]
    try:
        decoded = [piece.decode() for piece in pieces]
    except UnicodeDecodeError:
        with pytest.raises(StringsError, match="not UTF-8"):
            decode_strings(view, starts, end)
    else:
        assert decode_strings(view, starts, end) == decoded


def test_the_string_at_fault_is_named():
    for bad in ([b"ok", b"\xff", b"ok"], [b"ok", b"\xc3", b"\xa9"], [b"ok", b"caf\xc3", b"", b"\xa9"]):
        data = memoryview(packed(bad))
        starts, end = find_strings(data, 0, len(bad))
        with pytest.raises(StringsError) as caught:
            decode_strings(data, starts, end)
        assert caught.value.index == 1


def test_chunks_do_not_show(monkeypatch):
    texts = [f"token {n}" * (n % 40) for n in range(500)]
    data = memoryview(packed([t.encode() for t in texts]))
    expected, end = find_strings(data, 0, len(texts))
    for size in (16, 17, 100, 999):
        monkeypatch.setattr(strings, "MIN_CHUNK_BYTES", size)
        monkeypatch.setattr(strings, "MAX_CHUNK_BYTES", size)
        starts, found_end = find_strings(data, 0, len(texts))
        assert np.array_equal(starts, expected)
        assert found_end == end
    assert decode_strings(data, expected, end) == texts
