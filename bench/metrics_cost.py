"""What numbers cost: the engine's thread for each token and step, and a scrape of /metrics.

    python bench/metrics_cost.py [--json]

Medians of five rounds, each of 2,000 steps of a batch in which every answer gets one token, as decoding does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

from kvarn.engine import EngineStats
from kvarn.engine.meter import Meter, RequestClock
from kvarn.request import Request, SamplingParams, SequenceOutput
from kvarn.server.metrics import EngineNumbers, exposition
from kvarn.step import ScheduledSequence, SchedulerOutput

STEPS, ROUNDS, SCRAPES = 2000, 5, 50
TOKEN = SequenceOutput(0, (7,), " a")


def decoding(meter: Meter, clocks: Sequence[RequestClock]) -> float:
    """Seconds for `STEPS` steps in which each of these requests has a token."""
    work = tuple(ScheduledSequence(i, (7,), 100, ((0,),), sample=True) for i in range(len(clocks)))
    scheduled = SchedulerOutput(0, work)
    began = time.perf_counter()
    for _ in range(STEPS):
        now = time.perf_counter()
        meter.scheduled(scheduled, now)
        for clock in clocks:
            meter.gained(clock, (TOKEN,), now)
        meter.stepped(scheduled, now, now + 0.003)
    return time.perf_counter() - began


def median(measure: Callable[[], float]) -> float:
    """Of `ROUNDS` measurements, after one that does not count."""
    measure()
    return statistics.median(measure() for _ in range(ROUNDS))


def seconds_per_step(batch: int) -> float:
    """Of a step with one token for each of so many answers."""
    meter = Meter()
    clocks = [RequestClock(Request(str(i), (1,), SamplingParams()), (i,), 0.0) for i in range(batch)]
    return median(lambda: decoding(meter, clocks)) / STEPS


def seconds_per_scrape(models: int) -> float:
    """Of making the body of /metrics."""
    engines = [EngineNumbers(f"model-{i}", EngineStats()) for i in range(models)]

    def scrapes() -> float:
        began = time.perf_counter()
        for _ in range(SCRAPES):
            exposition(engines)
        return time.perf_counter() - began

    return median(scrapes) / SCRAPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    wants_json = parser.parse_args().json
    one, many = seconds_per_step(1), seconds_per_step(65)
    rows = {
        "ns a token": (many - one) / 64 * 1e9,
        "ns a step, without its tokens": (one - (many - one) / 64) * 1e9,
        "ms a scrape, one model": seconds_per_scrape(1) * 1e3,
        "ms a scrape, four models": seconds_per_scrape(4) * 1e3,
    }
    if wants_json:
        print(json.dumps(rows))
        return
    for name, value in rows.items():
        print(f"{name:32} {value:8.1f}")


if __name__ == "__main__":
    main()
