"""A mixed load that moves every number a server has: streams, grammars, refusals, clients that leave."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Mapping
from typing import Any

PROMPT = "The mill by the river grinds the grain, and the grain becomes flour, and the flour becomes bread. "
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def drive(address: str, seconds: float, clients: int = 3) -> None:
    """Sends requests for so long, each client one after the other, then returns. address: host:port."""
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=_client, args=(address, end, number), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _client(address: str, end: float, number: int) -> None:
    turn = number
    while time.monotonic() < end:
        kind = turn % 6
        text = PROMPT * 2 + str(turn % 4)
        if kind == 0:
            _post(address, {"prompt": text, "max_tokens": 24, "temperature": 0})
        elif kind == 1:
            _post(address, {"prompt": text, "max_tokens": 16, "n": 2, "stream": True})
        elif kind == 2:
            grammar = {"structured_outputs": {"json": SCHEMA}} if turn % 2 else {
                "structured_outputs": {"regex": f"[a-c]{{4}}{turn % 3}"}
            }  # fmt: skip
            _post(address, {"prompt": text, "max_tokens": 24, **grammar})
        elif kind == 3:
            _post(address, {"prompt": text, "max_tokens": 4}, {"x-slo-ttft-ms": "0.001"})
        elif kind == 4:
            _leave(address, {"prompt": text, "max_tokens": 200, "stream": True, "ignore_eos": True})
        else:
            _post(address, {"prompt": text, "max_tokens": -1})
        turn += 1


def _post(address: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
    """Sends a completion request and reads all of its answer, whatever it is."""
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        _send(connection, body, headers)
        connection.getresponse().read()
    finally:
        connection.close()


def _leave(address: str, body: Mapping[str, Any]) -> None:
    """Sends one and leaves after the first bytes of the answer."""
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        _send(connection, body)
        connection.getresponse().read1(1)
    finally:
        connection.close()


def _send(
    connection: http.client.HTTPConnection, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> None:
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json", **(headers or {})}
    )
