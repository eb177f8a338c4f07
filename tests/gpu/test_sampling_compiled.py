"""What the compiler makes of the sampling kernels for a Hopper card: no card is needed, and none is used."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_every_kernel_compiles_and_keeps_its_sums_in_registers():
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    script = Path(__file__).parent / "compile_sampling.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = {kernel["kernel"]: kernel for kernel in map(json.loads, done.stdout.splitlines())}
    assert kernels.keys() == {"_feed", "_adjust", "_survey", "_sample"}
    for kernel in kernels.values():
        assert kernel["stack"] <= 128, f"{kernel} spills"
        assert kernel["shared"] <= 48 << 10, kernel
