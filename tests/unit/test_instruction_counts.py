"""What `make instructions` says about two sets of counts."""

from instructions import Counts, compare

BASE = Counts("GNU 12.2.0", "-O2", {"linear": 1000, "attention": 50_000})


def counts(compiler: str = BASE.compiler, flags: str = BASE.flags, **kernels: int) -> Counts:
    return Counts(compiler, flags, {**BASE.kernels, **kernels})


def test_equal_counts_pass_without_remarks():
    result = compare(BASE, BASE)
    assert result.failures == result.remarks == []
    assert result.table[1].split() == ["linear", "1000", "1000", "+0.00%"]


def test_a_rise_up_to_three_percent_passes_and_one_beyond_names_its_kernel():
    assert compare(BASE, counts(linear=1030)).failures == []
    assert compare(BASE, counts(linear=1031)).failures == ["linear: +3.10%, more than 3%"]


def test_every_kernel_that_rose_is_named():
    failures = compare(BASE, counts(linear=2000, attention=60_000)).failures
    assert [failure.split(":")[0] for failure in failures] == ["linear", "attention"]


def test_a_fall_beyond_three_percent_passes_with_a_hint():
    assert compare(BASE, counts(linear=970)).remarks == []
    result = compare(BASE, counts(linear=969))
    assert result.failures == [] and "--update" in result.remarks[0] and "linear" in result.remarks[0]


def test_counts_of_another_compiler_are_shown_but_not_judged():
    result = compare(BASE, counts(compiler="GNU 13.1.0", linear=2000))
    assert result.failures == []
    assert "GNU 12.2.0" in result.remarks[0] and "GNU 13.1.0" in result.remarks[0]
    assert "+100.00%" in result.table[1]


def test_changed_flags_are_told_and_judged():
    result = compare(BASE, counts(flags="-O1", linear=2000))
    assert "-O2" in result.remarks[0] and len(result.failures) == 1


def test_a_kernel_that_one_side_lacks_fails():
    more = counts(norm=10)
    assert compare(BASE, more).failures == ["norm: not recorded; --update"]
    assert compare(more, BASE).failures == ["norm: no longer counted; --update"]
