"""Parts in processes of their own: a kernel that breaks the device's context, or hangs, takes only its part with it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_parts.results import Results, Row


def run_apart(results: Results, script: Path, part: str, arguments: list[str], seconds: float) -> None:
    """Runs `script` for one part and takes over what it wrote, also where it was ended or crashed.

    arguments: what the part is told beside its name and its folder.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), "--here", "--no-plots", "--only", part, "--out", folder, *arguments]
        try:
            ended = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            ended = None
        results.take(Path(folder, "results.json"))
    if ended is None:
        results.add(Row(part, "the rest of the part", failed=f"ended after {seconds:.0f} s, its limit"))
    elif ended not in (0, 1):
        results.add(Row(part, "the rest of the part", failed=f"its process ended with status {ended}"))
    results.seconds[part] = round(time.perf_counter() - started, 2)
    results.write()
