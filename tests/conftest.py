"""What tests share: where data and real models are."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

# Packed weights are kept by the tests that are about it, in folders of their own.
os.environ.setdefault("KVARN_PACKED_CACHE_BYTES", "0")
# `make test` runs two processes; what NumPy and torch multiply here is too small for threads of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a card Triton's kernels run in its interpreter, which must be known before anything imports Triton.
if not any(Path(file).exists() for file in ("/dev/nvidiactl", "/proc/driver/nvidia/version")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long begin first, so that of two processes none is left with one in the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def same_draws(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is asked for without a seed draws the same in every run of a test: none fails by a rare draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secrets.randbits", random.Random(request.node.nodeid).getrandbits)
        yield


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of test data (KVARN_TEST_DATA, or ../shared/data); the test is skipped where it is absent."""
    path = Path(os.environ.get("KVARN_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data at {path}; KVARN_TEST_DATA says where it is")
    return path


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real SmolLM2-135M, pulled on first use."""
    from kvarn.weights import catalog

    return catalog.resolve("smollm2-135m-instruct")
