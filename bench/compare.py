"""kvarn against llama.cpp: the same file, threads and work, in turns in one run; prints medians, spreads, ratios.

    python bench/compare.py MODEL.gguf --peer-python PATH [--threads 2] [--rounds 5] [--json FILE]

PATH is the Python of an environment with llama-cpp-python built for this machine. The peer runs with flash attention
off and on, and the better of the two counts in each row.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

HERE = Path(__file__).parent
TASKS = {
    "prefill 512": ({"op": "prefill", "tokens": 512}, 512),
    "decode, batch 1": ({"op": "decode", "tokens": 128}, 128),
    "decode, 16 sequences": ({"op": "decode", "tokens": 32, "batch": 16}, 512),
    "decode at depth 4096": ({"op": "decode", "tokens": 32, "depth": 4096}, 32),
}


class Worker:
    """A process that has the model loaded and times one task at a time."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.ready = self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early: run its worker by hand to see why")
        return json.loads(line)

    def seconds(self, task: dict) -> float:
        """Wall time of the task."""
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self._read()["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait(timeout=30)


def cpu_name() -> str:
    """The processor's name as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help="tasks whose name contains this")
    options = parser.parse_args()
    model, threads = str(options.model.resolve()), str(options.threads)
    peer = str(HERE / "peer_llamacpp.py")
    workers = [
        Worker("kvarn", [sys.executable, str(HERE / "worker_kvarn.py"), model, threads]),
        Worker("llama.cpp", [options.peer_python, peer, model, threads, "0"]),
        Worker("llama.cpp fa", [options.peer_python, peer, model, threads, "1"]),
    ]
    tasks = {name: task for name, task in TASKS.items() if not options.only or options.only in name}
    times: dict[str, dict[str, list[float]]] = {name: {w.name: [] for w in workers} for name in tasks}
    for round_number in track(range(options.rounds + 1), "rounds", console=Console(stderr=True)):
        for name, (task, _) in tasks.items():
            for worker in workers:
                seconds = worker.seconds(task)
                if round_number:  # the first round warms up
                    times[name][worker.name].append(seconds)
    for worker in workers:
        worker.close()

    title = f"{options.model.name}, {threads} threads, {cpu_name()}, {date.today()}: tokens/s, median (min to max)"
    table = Table("work", *(w.name for w in workers), "ratio", title=title)
    result = {
        "model": options.model.name,
        "threads": options.threads,
        "cpu": cpu_name(),
        "date": str(date.today()),
        "rounds": options.rounds,
        "peer": workers[1].ready.get("info"),
        "rows": {},
    }
    for name, (_, tokens) in tasks.items():
        rates = {w: sorted(tokens / s for s in seconds) for w, seconds in times[name].items()}
        medians = {w: statistics.median(r) for w, r in rates.items()}
        ratio = medians["kvarn"] / max(medians["llama.cpp"], medians["llama.cpp fa"])
        table.add_row(
            name, *(f"{medians[w]:.1f} ({r[0]:.1f} to {r[-1]:.1f})" for w, r in rates.items()), f"{ratio:.2f}×"
        )
        result["rows"][name] = {"tokens_per_s": medians, "all": rates, "ratio": ratio}
    Console(width=140).print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
