"""A `kvarn serve` of its own for each measurement: on a free port of the loopback interface, ended afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 120
SETTLE_SECONDS = 0.5
STOP_SECONDS = 30


@dataclass(frozen=True)
class Server:
    """Where a server answers."""

    host: str
    port: int
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        """The base of all its routes."""
        return f"http://{self.host}:{self.port}"

    @property
    def address(self) -> tuple[str, int]:
        """What a socket connects to."""
        return self.host, self.port


@contextlib.contextmanager
def served(
    model: str, *options: str, env: Mapping[str, str] | None = None, module: str = "kvarn", log: Path | None = None
) -> Iterator[Server]:
    """A server of the model that is ready to answer. options: of `kvarn serve`. env: beside this process' own.
    module: whose command line it is. log: where its stderr goes; None: to this process' own.

    Ready is when it has taken the memory of its KV cache, too, so that no measurement pays for that: give it a
    `--kv-cache-bytes` where that takes long. Raises SystemExit where it does not start; what it says then is on stderr.
    """
    command = [sys.executable, "-m", module, "serve", model, "--port", "0", *options]
    with contextlib.ExitStack() as stack:
        errors = None if log is None else stack.enter_context(log.open("w"))
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **(env or {})}
        )
    too_late = threading.Timer(START_SECONDS, process.kill)
    too_late.start()
    try:
        server = _ready(process, model)
        too_late.cancel()
        _settle(process.pid)
        yield server
    finally:
        too_late.cancel()
        process.terminate()
        process.wait(timeout=STOP_SECONDS)


def _settle(pid: int) -> None:
    """Waits until a process that does nothing else takes no more memory."""
    status, before = Path(f"/proc/{pid}/statm"), -1
    deadline = time.monotonic() + START_SECONDS
    while status.exists() and time.monotonic() < deadline:
        pages = int(status.read_text().split()[1])
        if pages <= before:
            return
        before = pages
        time.sleep(SETTLE_SECONDS)


def _ready(process: subprocess.Popen[str], model: str) -> Server:
    """Waits for the line with its address, which it says when it is ready; then reads on, so that it can say more."""
    assert process.stdout is not None
    for line in process.stdout:
        found = re.match(r"http://([\d.]+):(\d+)", line)
        if found:
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return Server(found[1], int(found[2]), process)
    raise SystemExit(f"the server of {model} did not start")
