"""Builds programs of tests/native with CMake; builds lie in build/ and are incremental."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def build(name: str, option: str, targets: tuple[str, ...]) -> Path:
    """Configures with `option` and builds; returns the folder of the programs, build/<name>."""
    folder = ROOT / "build" / name
    cmake = [sys.executable, "-m", "cmake"] if _has_module("cmake") else ["cmake"]
    subprocess.run([*cmake, "-S", ROOT / "native", "-B", folder, option], check=True, stdout=subprocess.DEVNULL)
    jobs = str(os.cpu_count() or 1)
    subprocess.run([*cmake, "--build", folder, "--parallel", jobs, "--target", *targets], check=True)
    return folder


def _has_module(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0
