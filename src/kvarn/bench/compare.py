"""kvarn and a peer on the same file, threads and work, in turns in one run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kvarn.bench.latency import Progress, Row, Sizes, Timings, make_row, time_in_turns
from kvarn.bench.machine import Machine
from kvarn.bench.process import Worker, kvarn_command
from kvarn.bench.roofline import Roof, RoofProbe, middle
from kvarn.bench.statistics import Spread
from kvarn.bench.tasks import Task, worker_messages
from kvarn.errors import ConfigError

PEERS_FOLDER = Path(__file__).parent / "peers"
KVARN = "kvarn"


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine to compare with. variants: names of settings; in each row the fastest of them counts."""

    script: Path
    variants: dict[str, str]
    """Name in tables to what the script is told."""


PEERS = {
    "llama.cpp": Peer(PEERS_FOLDER / "llama_cpp_worker.py", {"llama.cpp": "0", "llama.cpp fa": "1"}),
    "openvino": Peer(PEERS_FOLDER / "openvino_worker.py", {"openvino": "sdpa", "openvino paged": "paged"}),
}


@dataclass(frozen=True, slots=True)
class Engine:
    """One side of a comparison. info: what it says about itself."""

    name: str
    info: str
    load_s: float
    peak_rss: int


@dataclass(frozen=True, slots=True)
class Compared:
    """A task. rates: tokens a second of each engine. ratio: kvarn's median over that of `against`, the peer's best."""

    kvarn: Row
    rates: dict[str, Spread]
    seconds: dict[str, tuple[float, ...]]
    against: str
    ratio: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The results of `kvarn bench compare`."""

    peer: str
    engines: tuple[Engine, ...]
    rows: tuple[Compared, ...]
    roof: Roof
    """The median of the rows'."""


def find_peer(name: str) -> Peer:
    """The peer of that name. Raises ConfigError listing those there are."""
    if name not in PEERS:
        raise ConfigError(f"--peer must be one of {', '.join(PEERS)}, not {name!r}")
    return PEERS[name]


def measure_comparison(
    path: Path,
    sizes: Sizes,
    tasks: Sequence[Task],
    *,
    peer_name: str,
    peer: Peer,
    peer_python: str,
    machine: Machine,
    threads: int,
    isa: str,
    rounds: int,
    progress: Progress = lambda _done, _total: None,
) -> Comparison:
    """Times the tasks: each round does each task on every engine in turn; a first round warms up. The roof is measured
    before and after each turn of kvarn.

    All engines have the model loaded at the same time, and are idle while another works. Raises ConfigError where a
    worker fails.
    """
    messages = worker_messages(tasks)
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(KVARN, kvarn_command(path, threads, isa, tasks)))]
        for name, variant in peer.variants.items():
            command = [peer_python, str(peer.script), str(path.absolute()), str(threads), variant, messages]
            workers.append(stack.enter_context(Worker(name, command)))
        times = time_in_turns(workers, tasks, rounds, RoofProbe(isa, threads, machine), progress)
        engines = tuple(Engine(w.name, w.info, w.load_s, w.peak_rss) for w in workers)
    rows = tuple(_compared(task, times[task.name], sizes) for task in tasks)
    return Comparison(peer_name, engines, rows, middle([row.kvarn.roof for row in rows]))


def _compared(task: Task, times: Timings, sizes: Sizes) -> Compared:
    rates = {name: Spread.of([task.total_tokens / s for s in seconds]) for name, seconds in times.seconds.items()}
    against = max((name for name in rates if name != KVARN), key=lambda name: rates[name].median)
    return Compared(
        kvarn=make_row(task, times.seconds[KVARN], sizes.cost(task), times.roofs),
        rates=rates,
        seconds={name: tuple(seconds) for name, seconds in times.seconds.items()},
        against=against,
        ratio=rates[KVARN].median / rates[against].median,
    )
