"""Builds the native checks under sanitizers and runs them: `make sanitize`.

AddressSanitizer and UBSan run all kernels of the instruction sets this machine has over random shapes; ThreadSanitizer
runs the thread pool. Builds lie in build/sanitize-* and are incremental.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS = {"address,undefined": ("check_kernels", "check_pool"), "thread": ("check_pool",)}


def build(sanitizers: str, targets: tuple[str, ...]) -> Path:
    """Configures and builds; returns the folder of the programs."""
    folder = ROOT / "build" / f"sanitize-{sanitizers.replace(',', '-')}"
    cmake = [sys.executable, "-m", "cmake"] if _has_module("cmake") else ["cmake"]
    subprocess.run(
        [*cmake, "-S", ROOT / "native", "-B", folder, f"-DKVARN_SANITIZE={sanitizers}"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    jobs = str(os.cpu_count() or 1)
    subprocess.run([*cmake, "--build", folder, "--parallel", jobs, "--target", *targets], check=True)
    return folder


def _has_module(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


def main() -> None:
    for sanitizers, targets in RUNS.items():
        folder = build(sanitizers, targets)
        for target in targets:
            print(f"{sanitizers}: {target}", flush=True)
            subprocess.run([folder / target], check=True)


if __name__ == "__main__":
    main()
