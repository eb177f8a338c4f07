"""The worker's side of the protocol that this folder's `__init__` describes. Uses the standard library alone.

Scripts of peers import it as a neighbour, by its bare name; kvarn's own worker as part of the package.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]


def serve(load: Callable[[], tuple[Callable[[Message], float], str]]) -> None:
    """Loads, says that it is ready, and does tasks until stdin ends.

    load: returns what does a task and tells its seconds, and what the engine says about itself.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what engines print must not come between answers

    def answer(message: Message) -> None:
        print(json.dumps({**message, "peak_rss": peak_rss()}), file=answers, flush=True)

    started = time.perf_counter()
    seconds, info = load()
    answer({"load_s": time.perf_counter() - started, "info": info})
    for line in sys.stdin:
        answer({"seconds": seconds(json.loads(line))})


def peak_rss() -> int:
    """Most bytes of memory this process had at a time, pages of mapped files among them."""
    try:  # getrusage also counts what the process that started this one had
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
