"""The side of a worker that asks: starts its process, hands it tasks, reads what they took."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kvarn.bench.tasks import Task, worker_messages
from kvarn.errors import ConfigError

LAST_LINES = 8
"""Of a failed worker's stderr that are shown."""
PATIENCE = 30.0
"""Seconds that a worker has to end when it is asked to."""


class Worker:
    """A worker's process. A context manager: leaving it ends the process.

    `load_s`: seconds the model took to load, without the start of the interpreter. `peak_rss`: bytes, so far. `info`:
    what it says about itself. Raises ConfigError, with the end of its stderr, where it cannot be started or fails.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
            )
        except OSError as error:
            self._errors.close()
            raise ConfigError(f"{name}: {command[0]} cannot be run: {error.strerror}") from error
        try:
            ready = self._read("load_s")
        except BaseException:
            self.close()
            raise
        self.load_s = float(ready["load_s"])
        self.info = str(ready.get("info", ""))
        self.peak_rss = int(ready.get("peak_rss", 0))

    def seconds(self, task: Task) -> float:
        """Wall time of the task, as the worker measured it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(task.message()) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure(f"ended before {task.name}") from None
        answer = self._read("seconds")
        self.peak_rss = max(self.peak_rss, int(answer.get("peak_rss", 0)))
        seconds = float(answer["seconds"])
        if seconds <= 0:
            raise self._failure(f"reports {seconds} seconds for {task.name}")
        return seconds

    def _read(self, key: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure("ended early")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict) or not isinstance(message.get(key), int | float):
            raise self._failure(f"answered {line[:200]!r} where {key!r} was expected")
        return message

    def _failure(self, what: str) -> ConfigError:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").splitlines()
        said = "".join(f"\n  {line}" for line in lines[-LAST_LINES:])
        return ConfigError(f"{self.name}'s worker {what}{':' + said if said else ''}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self.close()

    def close(self) -> None:
        """Ends the process. Idempotent."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


def kvarn_command(path: Path, threads: int, isa: str, tasks: Iterable[Task]) -> list[str]:
    """How kvarn's own worker is started."""
    return [sys.executable, "-m", "kvarn.bench.worker", str(path), str(threads), isa, worker_messages(tasks)]
