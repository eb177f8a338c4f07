"""Tests of Triton kernels: on a card where there is one, else in Triton's interpreter on the CPU."""

import os

import pytest

torch = pytest.importorskip("torch")
ON_CARD = torch.cuda.is_available()
if not ON_CARD:
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined
pytest.importorskip("triton")

if not ON_CARD:
    from interpreter import repair

    repair()


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors are: "cuda", or "cpu" for the interpreter."""
    return "cuda" if ON_CARD else "cpu"
