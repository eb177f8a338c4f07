"""A process that has a model loaded and times one task at a time: `python -m kvarn.bench.worker`.

Arguments: the model's path, threads, instruction set, and the tasks as a JSON list. It speaks JSON lines, as the
scripts in `kvarn.bench.peers` do: when it is ready {"load_s", "peak_rss", "info"}, then for each task on stdin
{"seconds", "peak_rss"}. Anything else that is written to stdout goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from kvarn.backends.cpu import CpuBackend
from kvarn.bench.stepper import open_stepper
from kvarn.bench.tasks import Task

STATUS = Path("/proc/self/status")


def peak_rss() -> int:
    """Most bytes of memory this process had at a time, pages of mapped files among them."""
    try:  # getrusage also counts what the process that started this one had
        for line in STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Serves tasks until stdin ends."""
    path, threads, isa, tasks = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    backend = CpuBackend(threads=int(threads), isa=isa or None)
    started = time.perf_counter()
    with open_stepper(Path(path), backend, [Task.of(message) for message in json.loads(tasks)]) as stepper:
        loaded = time.perf_counter() - started
        info = f"{backend.isa}, {backend.threads} threads"
        answer({"load_s": loaded, "peak_rss": peak_rss(), "info": info})
        for line in sys.stdin:
            answer({"seconds": stepper.seconds(Task.of(json.loads(line))), "peak_rss": peak_rss()})


if __name__ == "__main__":
    main()
