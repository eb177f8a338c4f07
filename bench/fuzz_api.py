"""Requests made up from the server's own /openapi.json: how many answers are server errors, or not as it says.

    python bench/fuzz_api.py [URL] [--cases 20000] [--seed 0] [--only /v1/messages] [--workers 2] [--json]

Without a URL a server of a tiny random model is started on a free port. `schemathesis` makes the cases: a third with
bodies that fit the schema, a third with bodies that break it, and a third that fit it with most optional parameters
left out and the model's name right, which reach the engine more often. Each answer must have a status, a content type
and a body that the document tells of, and none may be a 5xx. Exits with 1 where that fails; --seed makes the same cases
again.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    negative_data_rejection,
]  # fmt: skip
SHOWN = 3
"""Failures of a route that are told in full."""
WAYS = ("fitting", "breaking", "plain")
WORKERS = 2


@dataclass
class Row:
    """What came of one route's cases."""

    label: str
    statuses: Counter = field(default_factory=Counter)
    failures: list = field(default_factory=list)

    @property
    def cases(self):
        """Answers."""
        return self.statuses.total()

    def count(self, first):
        """Answers whose status begins with that digit."""
        return sum(number for status, number in self.statuses.items() if status // 100 == first)


@dataclass(frozen=True)
class Unit:
    """Cases of one route that are made in one way. place: of the route among the document's."""

    url: str
    place: int
    way: str
    count: int
    number: int


def fuzz(url, cases, number=0, only="", on_row=lambda row: None, workers=WORKERS):
    """The rows of all routes, `cases` in all. number: of the made-up requests, the same ones for the same number.

    workers: processes that make them up, which takes longer than answering them; 1: this one. Who makes a case changes
    nothing of it.
    """
    operations, _ = _document(url)
    # Routes without a body have little to make up, those without parameters nothing.
    weights = {
        place: 10 if operation.body else len(operation.path_parameters)
        for place, operation in enumerate(operations)
        if operation.path.startswith(only)
    }
    a_weight = cases / len(WAYS) / max(1, sum(weights.values()))
    units = [
        Unit(url, place, way, max(1, round(a_weight * weight)), 3 * number + turn)
        for place, weight in weights.items()
        for turn, way in enumerate(WAYS)
    ]
    rows = {}
    with contextlib.ExitStack() as stack:
        parts = map(_answered, units)
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            parts = stack.enter_context(ProcessPoolExecutor(workers, context)).map(_answered, units)
        for unit, part in zip(units, parts, strict=True):
            row = rows.setdefault(unit.place, Row(part.label))
            row.statuses += part.statuses
            row.failures += part.failures
            if unit.way == WAYS[-1]:
                on_row(row)
    return list(rows.values())


@functools.cache
def _document(url):
    """The operations of a server's document, and the parameters by path that a body cannot do without."""
    found = [result.ok() for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()]
    return found, _required(requests.get(f"{url}/openapi.json", timeout=60).json())


def _answered(unit):
    """What came of a unit."""
    operations, required = _document(unit.url)
    operation = operations[unit.place]
    row = Row(operation.label)
    with requests.Session() as session:
        needed = required.get(operation.path, frozenset())
        _fuzz(operation, unit.way, unit.count, unit.number, row, session, needed)
    return row


def _required(document):
    """The parameters by path that a body cannot do without."""
    found = {}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                name = schema["$ref"].rsplit("/", 1)[1]
                found[path] = frozenset(document["components"]["schemas"][name].get("required", ()))
    return found


def _fuzz(operation, way, count, number, row, session, required):
    rng = random.Random(number)
    mode = GenerationMode.NEGATIVE if way == "breaking" and operation.body else GenerationMode.POSITIVE

    @seed(number)
    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case):
        if way == "plain" and isinstance(case.body, dict):
            case.body = _plain(case.body, required, rng)
        response = case.call(session=session)
        row.statuses[response.status_code] += 1
        try:
            # A body that is too large is refused unread, be it wrong or not.
            case.validate_response(response, checks=CHECKS[:-1] if response.status_code == 413 else CHECKS)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            row.failures.append(str(error))

    ask()


def _plain(body, required, rng):
    """The body with one in five of what may be left out, and a conversation that a chat template can take."""
    kept = {key: value for key, value in body.items() if key in required or (key != "model" and rng.random() < 0.2)}
    if isinstance(kept.get("messages"), list):
        kept["messages"] = [{"role": "user", "content": f"message {rng.random()}"}]
    if "max_tokens" in kept:
        kept["max_tokens"] = rng.randint(1, 8)
    return kept


def table(rows):
    """What came out, as text."""
    width = max(len(row.label) for row in rows)
    lines = [f"{'route':{width}}  cases    2xx    4xx    5xx  not as documented"]
    total = Row("all", sum((row.statuses for row in rows), Counter()), [f for row in rows for f in row.failures])
    lines += [
        f"{row.label:{width}} {row.cases:6} {row.count(2):6} {row.count(4):6} {row.count(5):6} {len(row.failures):6}"
        for row in (*rows, total)
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def tiny_server():
    """A server of a tiny random model; yields its base URL."""
    from serving import served

    from kvarn.testing import write_tiny_gguf

    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_gguf(Path(folder) / "tiny.gguf")
        with served(str(path), "--max-model-len", "128", "--kv-cache-bytes", "4MiB", "--threads", "1") as server:
            yield server.url


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", help="base URL of a server; default: one of a tiny model, started for this")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="routes whose path begins so")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes that make requests up")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args()
    begun = time.monotonic()

    def tell(row):
        print(f"{time.monotonic() - begun:6.0f} s  {row.label}: {row.cases} cases", file=sys.stderr)
        for failure in row.failures[:SHOWN]:
            print(failure, file=sys.stderr)

    with contextlib.nullcontext(chosen.url) if chosen.url else tiny_server() as url:
        rows = fuzz(url, chosen.cases, chosen.seed, chosen.only, tell, chosen.workers)
    if chosen.json:
        print(json.dumps([{"route": r.label, "statuses": r.statuses, "failures": len(r.failures)} for r in rows]))
    else:
        print(table(rows))
    sys.exit(1 if any(row.failures or row.count(5) for row in rows) else 0)


if __name__ == "__main__":
    main()
