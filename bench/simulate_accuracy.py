"""The simulator against the server that it simulates: a slice of a trace, replayed on both with the same settings.

    python bench/simulate_accuracy.py TRACE.csv [MODEL] [--seconds 600] [--speed 0.2] [--steps steps.json] [--json]

The server runs on a free port of the loopback interface; every request is sent at its time, whether or not others are
answered (open loop), with a prompt of as many tokens as the trace says, and gets exactly as many as it says. Without
--steps, steps are measured first with `kvarn bench steps`. Printed: throughput and percentiles of the time to the first
token of both, and their ratios.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from asking import ask
from serving import served

from kvarn.bench.serve.client import Target, open_client
from kvarn.simulate import Settings, read_traffic, simulate
from kvarn.simulate.fit import fit, read_steps
from kvarn.simulate.results import percentiles
from kvarn.traffic import cut, from_zero, scale


async def replay(url, traffic):
    """The answers, and when the replay began."""
    async with open_client(Target(url, "completions", timeout=3600)) as client:
        model, started = (await client.models())[0], time.perf_counter() + 0.5

        async def one(number, arrival):
            planned = started + arrival.time
            await asyncio.sleep(max(0.0, planned - time.perf_counter()))
            prompt = [(1000 + number * 31 + place * 7) % 40_000 for place in range(arrival.prompt_tokens)]
            body = {"model": model, "prompt": prompt, "max_tokens": arrival.output_tokens, "temperature": 0,
                    "ignore_eos": True}  # fmt: skip
            return await ask(client, body, planned)

        return await asyncio.gather(*(one(number, arrival) for number, arrival in enumerate(traffic))), started


def serve(options, settings, traffic):
    """What the real server did."""
    given = [
        "--threads", str(options.threads), "--max-num-seqs", str(settings.max_num_seqs),
        "--max-num-batched-tokens", str(settings.max_num_batched_tokens), "--max-num-queued-requests", "100000",
        "--kv-cache-bytes", options.kv_cache_bytes, *options.serve,
    ]  # fmt: skip
    with served(options.model, *given) as server:
        answers, started = asyncio.run(replay(server.url, traffic))
    late = max(answer.lag for answer in answers)
    ttft = percentiles(np.array([answer.ttft for answer in answers]))
    duration = max(answer.stamps[-1] for answer in answers) - started
    tokens = sum(arrival.output_tokens for arrival in traffic)
    return {"tokens_per_s": tokens / duration, "duration_s": duration, "ttft_s": ttft, "sent_late_s": late}


def measured_steps(options, folder):
    path = folder / "steps.json"
    threads = str(options.threads)
    command = [sys.executable, "-m", "kvarn", "bench", "steps", options.model, "--threads", threads, "--json"]
    path.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    return path


def plan_of(options):
    cache = options.kv_cache_bytes
    command = [sys.executable, "-m", "kvarn", "plan", options.model, "--kv-cache-bytes", cache, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["served"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--start", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=600.0, help="of replay; the trace's are fewer by --speed")
    parser.add_argument("--speed", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--kv-cache-bytes", default="2GiB")
    parser.add_argument("--steps", type=Path)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further options of `kvarn serve`")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    plan = plan_of(options)
    settings = Settings(num_blocks=plan["num_blocks"], max_model_len=plan["max_model_len"])
    slice_ = cut(read_traffic(options.trace), options.start, options.seconds * options.speed)
    whole = scale(slice_, speed=options.speed)
    traffic = from_zero(a for a in whole if a.prompt_tokens + a.output_tokens <= settings.max_model_len)
    with tempfile.TemporaryDirectory() as folder:
        model = fit(read_steps(options.steps or measured_steps(options, Path(folder))))
    real = serve(options, settings, traffic)
    run = simulate(traffic, settings, model.cost)
    simulated = {"tokens_per_s": run.tokens_per_s, "duration_s": run.duration, "ttft_s": run.ttft}
    ratios = {
        "tokens_per_s": simulated["tokens_per_s"] / real["tokens_per_s"],
        "ttft_p50": simulated["ttft_s"][50] / real["ttft_s"][50],
        "ttft_p99": simulated["ttft_s"][99] / real["ttft_s"][99],
    }
    result = {"requests": len(traffic), "utilization": run.utilization, "real": real, "simulated": simulated,
              "simulated_to_real": ratios, "fit_median_error": model.median_error}  # fmt: skip
    if options.json:
        print(json.dumps(result))
        return
    print(f"{len(traffic)} requests in {traffic[-1].time:.0f} s, sent at most {real['sent_late_s'] * 1e3:.0f} ms late; "
          f"the simulated server is busy {100 * run.utilization:.0f} % of the time")  # fmt: skip
    for name, side in (("real", real), ("simulated", simulated)):
        ttft = side["ttft_s"]
        print(f"{name:10} {side['tokens_per_s']:8.1f} tokens/s   TTFT p50 {ttft[50]:.3f}, p95 {ttft[95]:.3f}, "
              f"p99 {ttft[99]:.3f} s")  # fmt: skip
    print(f"{'ratio':10} {ratios['tokens_per_s']:8.3f}            TTFT p50 {ratios['ttft_p50']:.3f}, "
          f"p99 {ratios['ttft_p99']:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
