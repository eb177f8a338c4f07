"""Server-sent events out of bytes that arrive in pieces of any size."""

from __future__ import annotations

import re

MAX_LINE_BYTES = 16 << 20
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class SseReader:
    """Reads one stream by the rules of the HTML standard (section 9.2.6); the fields but `data` are left out.

    Owns what has come of an event that is not complete yet.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._begun = False

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that this piece completes. Raises ValueError for a line longer than 16 MiB."""
        text = self._rest + piece
        # A carriage return at the end may be the first half of a line end.
        held = 1 if text.endswith(b"\r") else 0
        lines = _LINE_END.split(text[: len(text) - held])
        self._rest = lines.pop() + text[len(text) - held :]
        if len(self._rest) > MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes")
        return [event for line in lines if (event := self._line(line)) is not None]

    def close(self) -> list[bytes]:
        """The data of an event that the stream's last byte completes; an event cut short is none."""
        return self.feed(b"\n") if self._rest == b"\r" else []

    def _line(self, line: bytes) -> bytes | None:
        if not self._begun:
            line, self._begun = line.removeprefix(_BOM), True
        if not line:
            data, self._data = self._data, []
            return b"\n".join(data) if data else None
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
        return None
