"""One streamed request over HTTP, for the measurements that need something else than `kvarn bench serve` sends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvarn.bench.serve.answers import Answer, read_answer
from kvarn.bench.serve.client import Client


async def ask(client: Client, body: Mapping[str, Any], planned: float | None = None) -> Answer:
    """The answer, when it has ended; its times are of `time.perf_counter`.

    Raises RuntimeError with what the server said where the answer did not come whole.
    """
    fields = {**body, "stream": True, "stream_options": {"include_usage": True}}
    answer = read_answer(await client.ask(json.dumps(fields).encode(), planned))
    if answer.failure:
        raise RuntimeError(f"{answer.failure}: {answer.detail}")
    return answer
