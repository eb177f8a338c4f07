"""What tests of the instrument share: a fake engine, a fixed roof, a tiny file."""

import json
import sys
from pathlib import Path

import pytest

from kvarn.bench import compare, latency, roofline
from kvarn.bench.process import Worker
from kvarn.bench.roofline import Roof
from kvarn.testing.gguf import write_tiny_gguf

FAKE = Path(__file__).with_name("fake_peer.py")


@pytest.fixture
def roof() -> Roof:
    """Round numbers: 10 GB/s, 100 and 20 GMAC/s."""
    return Roof(2, 10e9, 100e9, 20e9)


@pytest.fixture
def fixed_roof(roof, monkeypatch):
    """No command measures the machine; it is given."""
    for module in (latency, compare, roofline):
        monkeypatch.setattr(module, "RoofProbe", lambda *_: lambda: roof)
    return roof


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tiny random model in a file."""
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def fake_worker():
    """Starts the fake engine; all that were started are ended with the test."""
    started = []

    def start(variant, tasks) -> Worker:
        messages = json.dumps([task.message() for task in tasks])
        started.append(Worker("fake", [sys.executable, str(FAKE), "model.gguf", "2", variant, messages]))
        return started[-1]

    yield start
    for worker in started:
        worker.close()
