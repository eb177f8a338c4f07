"""The kernels that measure the machine do what they say they do."""

import numpy as np
import pytest

from kvarn import _native
from kvarn.backends.cpu import available_isas

MIB = 1 << 20


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("size", [0, 256, 3 * 256, 70 * 256])
@pytest.mark.parametrize("offset", [0, 1, 64])
def test_every_byte_is_read(isa, size, offset):
    data = np.random.default_rng(size).integers(0, 256, size + offset, np.uint8)[offset:]
    words = np.frombuffer(data.tobytes(), "<u4")
    assert _native.read_sum(isa, data) == int(words.sum(dtype=np.uint64)) % 2**32


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("threads", [1, 3])
def test_work_is_counted(isa, threads):
    pool = _native.Pool(threads, [])
    roofline = _native.Roofline(isa, 4 * MIB, pool)
    amount, seconds = roofline.read(pool)
    assert amount == 4 * MIB and seconds > 0
    for peak in (roofline.integer, roofline.floating):
        (once, first), (twice, second) = peak(pool, 10, 2), peak(pool, 20, 2)
        assert once > 0 and once % (16 * 10 * 2 * threads) == 0
        assert twice == 2 * once
        assert first > 0 and second > 0


def test_bad_sizes_are_refused():
    pool = _native.Pool(1, [])
    with pytest.raises(ValueError, match="multiple of 256"):
        _native.read_sum("scalar", np.zeros(100, np.uint8))
    with pytest.raises(ValueError, match="whole mebibytes"):
        _native.Roofline("scalar", MIB + 1, pool)
    roofline = _native.Roofline("scalar", MIB, pool)
    with pytest.raises(ValueError, match="iterations"):
        roofline.integer(pool, 0, 1)
    with pytest.raises(ValueError, match="items"):
        roofline.floating(pool, 1, 0)
    with pytest.raises(ValueError, match="not available"):
        _native.Roofline("mmx", MIB, pool)
