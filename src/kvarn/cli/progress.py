"""Progress bars for work of more than two seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID


def resolve_with_progress(model: str, *, quiet: bool) -> Path:
    """`catalog.resolve` with a bar on stderr while it downloads. rich is loaded only when there is need."""
    from kvarn.weights import catalog

    return _with_bar(catalog.resolve, model, quiet)


def pull_with_progress(model: str, *, quiet: bool) -> Path:
    """`catalog.pull` with a bar on stderr while it downloads."""
    from kvarn.weights import catalog

    return _with_bar(catalog.pull, model, quiet)


@contextmanager
def work_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by calling what is yielded with (done, total). None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def share_bar() -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr, moved by calling what is yielded with (what is being done, the share of it that is). None where
    stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _what, _share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def told(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=1.0)
            bar.update(tasks[what], completed=share)

        yield told


def _with_bar(fetch: Callable[..., Path], model: str, quiet: bool) -> Path:
    if quiet:
        return fetch(model)
    bar = _LazyBar(f"pulling {model}")
    try:
        return fetch(model, progress=bar.update)
    finally:
        bar.close()


class _LazyBar:
    """A byte-progress bar that appears with the first update."""

    def __init__(self, title: str) -> None:
        from typing import Any

        self._title = title
        self._progress: Any = None
        self._task: Any = None

    def update(self, done: int, total: int) -> None:
        """Shows `done` of `total` bytes."""
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                console=Console(stderr=True),
            )
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=total)
        self._progress.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """Ends the bar."""
        if self._progress is not None:
            self._progress.stop()
