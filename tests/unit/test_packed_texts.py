"""`PackedTexts` is the list it was made of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.text.packed_texts import PackedTexts


@given(st.lists(st.text(max_size=5)), st.integers(-7, 7), st.slices(7))
def test_it_is_the_list_that_it_was_made_of(texts, index, part):
    packed = PackedTexts(texts)
    assert len(packed) == len(texts)
    assert list(packed) == texts
    assert packed[part] == texts[part]
    assert packed.longest() == max(map(len, texts), default=0)
    if -len(texts) <= index < len(texts):
        assert packed[index] == texts[index]
    else:
        with pytest.raises(IndexError, match=f"there are {len(texts)} texts, not {index}"):
            packed[index]
