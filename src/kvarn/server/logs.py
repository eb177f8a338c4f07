"""Structured logs: a line for each event, as text or JSON. Prompts and answers are never in them."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO

FORMATS = ("text", "json")
ACCESS = "kvarn.access"
"""The logger of finished requests; `extra={"fields": …}` has what is told of one."""


class TextFormatter(logging.Formatter):
    """`2026-11-21T20:00:00.123Z INFO request request_id=… status=200 …`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback after it where there is one."""
        fields = getattr(record, "fields", {})
        said = " ".join(f"{name}={_plain(value)}" for name, value in fields.items())
        line = f"{_time(record.created)} {record.levelname} {record.getMessage()} {said}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object in a line: `time`, `level`, `message`, and what is told of a request."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, the traceback as `traceback`."""
        event = {"time": _time(record.created), "level": record.levelname.lower(), "message": record.getMessage()}
        event |= getattr(record, "fields", {})
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return json.dumps(event)


def _time(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03}Z"


def _plain(value: object) -> str:
    """A value without spaces or quotes as it is, others as JSON has them: one line is one event, whatever is in it."""
    text = str(value)
    return text if text.isascii() and text.isprintable() and not set(text) & set(' "=') else json.dumps(text)


def configure_logging(form: str, *, access: bool = True, stream: TextIO | None = None) -> None:
    """Sends what kvarn and uvicorn log to `stream` (stderr) in this format, one of `FORMATS`.

    access: whether finished requests are logged, too.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    for name in ("kvarn", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING)
    logging.getLogger("kvarn.server").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a line for each piece of garbage fills disks
    logging.getLogger(ACCESS).setLevel(logging.INFO if access else logging.WARNING)
