"""docs/dev/adding-an-isa.md lists what a vec_<isa>.h must offer: what the existing ones offer and the kernels use."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/dev/adding-an-isa.md").read_text()
KERNELS = ROOT / "native/kernels"
DEFINED = re.compile(r"^(?:inline [\w: ]+[ *]|constexpr int |struct |using )(\w+)(?=[ (]|$)", re.MULTILINE)


def offered(isa: str) -> set[str]:
    return set(DEFINED.findall((KERNELS / f"vec_{isa}.h").read_text()))


def listed() -> set[str]:
    table = re.search(r"<!-- names:begin -->\n(.*?)<!-- names:end -->", PAGE, re.DOTALL)
    assert table is not None
    cells = [row.split("|")[1] for row in table[1].splitlines()[2:]]
    return {name for cell in cells for name in re.findall(r"`(\w+)", cell)}


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_isa_offers_what_the_page_lists(isa):
    assert listed() - offered(isa) == set()


def test_the_page_lists_all_that_every_isa_offers_and_the_kernels_use():
    users = [path.read_text() for path in [*KERNELS.glob("*.cpp"), KERNELS / "linear_scales.h", KERNELS / "vec.h"]]
    common = offered("scalar") & offered("avx2") & offered("avx512")
    used = {name for name in common if any(re.search(rf"\b{name}\b", text) for text in users)}
    assert used - listed() == set()


def test_the_places_the_page_names_are_there():
    for place in ("vec.h", "table.cpp", "kernels_internal.h", "vec_avx2.h", "vec_avx512.h", "vec_scalar.h"):
        assert place in PAGE and (KERNELS / place).is_file()
    assert "kIsas" in (ROOT / "native/runtime/isa.cpp").read_text()
    assert "KVARN_ISAS" in (ROOT / "native/CMakeLists.txt").read_text()
