"""What the compiler makes of the element-wise kernels for a Hopper card: no card is needed, and none is used."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path


def test_every_kernel_compiles_and_stays_in_registers():
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    script = Path(__file__).parent / "compile_ops.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert Counter(kernel["kernel"] for kernel in kernels) == {"_norm": 3, "_rope": 3, "_activation": 2, "_rows": 2}
    assert all(kernel["stack"] == 0 for kernel in kernels), kernels
