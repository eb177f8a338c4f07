"""OpenVINO GenAI on the same GGUF file. The protocol is described in this folder's `__init__`.

VARIANT: "sdpa" or "paged", its two attention back-ends. It offers whole generations only, so its greedy sampler is
within what is timed: a prompt is the time to one token, decode is what more tokens take after the first. Its cache type
is its own default. Prefix caching is off, and no two prompts begin alike.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai
from peer_protocol import Message, serve

VOCABULARY = 1 << 14
"""Token ids up to here are used: every model has so many."""


class Runner:
    """A pipeline for all tasks."""

    def __init__(self, path: str, threads: int, variant: str, tasks: Sequence[Message]) -> None:
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        if variant == "paged":
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.enable_prefix_caching = False
            scheduler.max_num_batched_tokens = max(task["depth"] + task["tokens"] for task in tasks)
            settings["scheduler_config"] = scheduler
        else:
            settings["ATTENTION_BACKEND"] = "SDPA"
        self._pipeline = openvino_genai.LLMPipeline(path, "CPU", **settings)
        self._calls = 0

    def seconds(self, task: Message) -> float:
        """Seconds of the task."""
        if task["op"] == "prefill":
            return self._generate(1, task["tokens"], 1)[1]
        whole, first = self._generate(task["batch"], max(1, task["depth"]), task["tokens"] + 1)
        return whole - first

    def _generate(self, batch: int, prompt: int, tokens: int) -> tuple[float, float]:
        """Seconds until the last token and until the first."""
        self._calls += 1
        ids = 31 * np.arange(batch)[:, None] + 7 * np.arange(prompt)[None, :] + 13 * self._calls
        ids = (ids % VOCABULARY).astype(np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos, config.do_sample = True, False
        started = time.perf_counter()
        result = self._pipeline.generate(inputs, config)
        whole = time.perf_counter() - started
        if any(len(row) != tokens for row in result.tokens):
            raise SystemExit(f"openvino made {[len(row) for row in result.tokens]} tokens instead of {tokens}")
        return whole, min(whole, result.perf_metrics.raw_metrics.m_times_to_first_token[0] / 1e6)


def main() -> None:
    """Serves tasks until stdin ends."""
    path, threads, variant, tasks = sys.argv[1:]

    def load() -> tuple[Callable[[Message], float], str]:
        runner = Runner(path, int(threads), variant, json.loads(tasks))
        return runner.seconds, f"openvino-genai {openvino_genai.get_version()}"

    serve(load)


main()
