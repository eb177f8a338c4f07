"""kvarn's C++ module, built where it is missing: the engine needs it, the CUDA back-end alone does not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

BUILD_SECONDS = 240.0


class NoNativeModule(RuntimeError):
    """kvarn._native is not there and could not be built; says what to do."""


def ensure_native(root: Path) -> None:
    """Builds kvarn._native in place, for the Python that runs this, where it cannot be found. About half a minute.

    root: of the source tree. Raises NoNativeModule.
    """
    if importlib.util.find_spec("kvarn._native") is not None:
        return
    if not (root / "native" / "CMakeLists.txt").is_file():
        raise NoNativeModule(f"kvarn is not installed, and {root} is no source tree to build it from")
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    tools = {tool: shutil.which(tool, path=places) for tool in ("cmake", "ninja")}
    missing = [tool for tool, path in tools.items() if path is None]
    if importlib.util.find_spec("nanobind") is None:
        missing.append("nanobind")
    if missing:
        raise NoNativeModule(f"kvarn._native is not built; building it needs {', '.join(missing)} (pip install them)")
    build = root / "build" / f"gpu-{sys.implementation.cache_tag}"
    cmake = str(tools["cmake"])
    configure = [cmake, "-S", str(root / "native"), "-B", str(build), "-G", "Ninja",
                 f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}", f"-DPython_EXECUTABLE={sys.executable}",
                 "-DCMAKE_CXX_FLAGS=-w"]  # fmt: skip
    # -w: what a newer compiler warns of must not end a measurement.
    for command in (configure, [cmake, "--build", str(build), "--target", "_native"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        if done.returncode:
            raise NoNativeModule(f"kvarn._native could not be built: {(done.stderr or done.stdout)[-400:]}")
    importlib.invalidate_caches()
