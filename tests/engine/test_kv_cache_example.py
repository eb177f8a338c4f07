"""The example does what it says: the same bits with and without the cache."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "kv_cache.py"


@pytest.mark.e2e
def test_the_kv_cache_example(smollm2_path):
    command = [sys.executable, str(EXAMPLE), str(smollm2_path), "--contexts", "20", "300", "--tokens", "3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "bit-equal" in result.stdout
    assert "bytes a token" in result.stdout
