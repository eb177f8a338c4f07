"""`PackedSlot`: where packed weights lie between runs; `PackedWriter` fills it in the background."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvarn.backends.cpu.packed_file import (
    DamagedFileError,
    PackedWeights,
    StaleFileError,
    file_bytes,
    read_packed,
    write_packed,
)
from kvarn.program import Program

logger = logging.getLogger(__name__)

TEMPORARY_SUFFIX = ".tmp"


@dataclass(frozen=True, slots=True)
class PackedSlot:
    """A place for one model's packed weights.

    key: names their content; a file of another key is never used. admit: asked with the bytes of a file before it is
    written whether it may be (and makes room for it).
    """

    path: Path
    key: str
    admit: Callable[[int], bool]

    def read(self, program: Program) -> PackedWeights | None:
        """The weights, mapped; None where they have to be packed anew."""
        try:
            return read_packed(self.path, self.key, program)
        except FileNotFoundError:
            return None
        except StaleFileError:
            logger.info("%s is out of date and will be written anew", self.path)
        except (DamagedFileError, OSError) as error:
            logger.warning("%s cannot be used and will be written anew: %s", self.path, error)
        return None


class PackedWriter:
    """Writes packed weights to their slot in a thread, atomically: whole, or not at all. Never raises for the disk."""

    def __init__(self, slot: PackedSlot, program: Program, weights: PackedWeights) -> None:
        self._slot = slot
        self._program = program
        self._weights = weights
        self._started = False
        self._cancelled = threading.Event()
        self._done = threading.Event()

    def start(self) -> None:
        """Begins, where it has not begun yet."""
        if self._started:
            return
        self._started = True
        try:
            threading.Thread(target=self._run, name="kvarn-packed-cache", daemon=True).start()
        except RuntimeError as error:
            logger.warning("packed weights are not kept: %s", error)
            self._done.set()

    def finish(self) -> None:
        """Waits until the file is there. An interrupt gives it up."""
        try:
            self.start()
            self._done.wait()
        except BaseException:
            self._cancelled.set()
            if self._started:
                self._done.wait()
            raise

    def _run(self) -> None:
        try:
            if self._slot.admit(file_bytes(self._program, self._weights.dtypes)):
                self._write()
        except OSError as error:
            logger.warning("packed weights are not kept: %s: %s", self._slot.path, error.strerror or error)
        finally:
            self._done.set()

    def _write(self) -> None:
        folder = self._slot.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=folder, suffix=TEMPORARY_SUFFIX)
        try:
            for _ in write_packed(fd, self._slot.key, self._program, self._weights):
                if self._cancelled.is_set():
                    return
            os.fsync(fd)
            os.replace(name, self._slot.path)
        finally:
            os.close(fd)
            with suppress(FileNotFoundError):
                os.unlink(name)
