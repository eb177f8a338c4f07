"""kvarn's own worker, a process that has a model loaded and times one task at a time: `python -m kvarn.bench.worker`.

Arguments: the model's path, threads, instruction set, and the tasks as a JSON list. It speaks as the scripts in
`kvarn.bench.peers` do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from kvarn.backends.cpu import CpuBackend
from kvarn.bench.peers.peer_protocol import Message, serve
from kvarn.bench.stepper import open_stepper
from kvarn.bench.tasks import Task


def main() -> None:
    """Serves tasks until stdin ends."""
    path, threads, isa, tasks = sys.argv[1:]
    backend = CpuBackend(threads=int(threads), isa=isa or None)
    with ExitStack() as stack:

        def load() -> tuple[Callable[[Message], float], str]:
            expected = [Task.of(message) for message in json.loads(tasks)]
            stepper = stack.enter_context(open_stepper(Path(path), backend, expected))
            return lambda message: stepper.seconds(Task.of(message)), f"{backend.isa}, {backend.threads} threads"

        serve(load)


if __name__ == "__main__":
    main()
