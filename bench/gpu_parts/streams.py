"""Many requests at once on the same weights: kvarn's engine, and transformers in its two fast ways."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from gpu_parts.bench import Bench
from gpu_parts.engines import engine
from gpu_parts.loaded import load
from gpu_parts.random_models import random_model, transformers_model
from gpu_parts.results import Row, Wanted, release
from gpu_parts.shapes import Sizes, Streams
from kvarn.models.in_memory import InMemoryModel
from kvarn.request import SamplingParams

SPEED = Wanted(least=2.0)
ALIKE = Wanted(most=0.1)
"""Of the logits' difference to transformers', as a share of their size: two roundings of bf16 through all layers."""
ROUNDS = 3
KVARN, STATIC, CONTINUOUS = "kvarn", "transformers, static cache, compiled", "transformers, continuous batching"
FASTER = ("flash_attn", "kernels")
"""Packages that continuous batching takes flash attention from; without them it is SDPA over a mask."""
Prompts = list[list[int]]
Run = Callable[[Prompts], int]
"""Answers all prompts and returns the number of tokens said."""


def measure_streams(bench: Bench) -> None:
    """Each model: greedy answers of one length to prompts of one length, the engines one after the other."""
    for name, settings in bench.sizes.models.items():
        race = Race(bench, name, random_model(settings, bench.device), settings)
        _kvarn(race)
        release()
        logits = _logits(race)
        release()
        _transformers(race, logits)
        release()
        _compare(race)


@dataclass(frozen=True, slots=True)
class Race:
    """Engines on the weights of one model."""

    bench: Bench
    name: str
    model: InMemoryModel
    settings: dict[str, Any]
    rates: dict[str, float] = field(default_factory=dict)
    """Tokens a second, by engine."""

    def prompts(self, seed: int) -> Prompts:
        """Random ones: other ones for each seed, so that no engine finds what it has computed before."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.bench.sizes.streams.count, self.bench.sizes.streams.prompt)
        ids: Prompts = torch.randint(3, self.model.config.vocab_size, shape, generator=generator).tolist()
        return ids

    def run(self, engine_name: str, run: Run, **detail: Any) -> None:
        """Tokens a second: the median of some rounds after one that compiles and warms up. detail: for its row."""
        clock, streams = self.bench.clock, self.bench.sizes.streams
        found = []
        for number in range(1 if clock.quick else 1 + ROUNDS):
            prompts = self.prompts(number)
            clock.synchronize()
            started = time.perf_counter()
            tokens = run(prompts)
            clock.synchronize()
            seconds = time.perf_counter() - started
            if tokens != streams.count * streams.output:
                raise RuntimeError(f"{tokens} tokens came, not {streams.count * streams.output}")
            if number or clock.quick:
                found.append(tokens / seconds)
        self.rates[engine_name] = rate = statistics.median(found)
        self.bench.results.point("streams", model=self.name, engine=engine_name, rate=rate, count=streams.count)
        self.bench.add(
            Row("streams", f"{self.name}, {engine_name}", rate, "tokens/s", detail={**detail, "rounds": found})
        )

    def attempt(self, what: str) -> AbstractContextManager[None]:
        """See `Results.attempt`."""
        return self.bench.results.attempt("streams", f"{self.name}, {what}")


def _kvarn(race: Race) -> None:
    sizes = race.bench.sizes
    with race.attempt(KVARN), engine(race.model, race.bench.clock.device, sizes) as llm:
        sampling = SamplingParams(temperature=0.0, max_tokens=sizes.streams.output, ignore_eos=True)
        race.run(KVARN, lambda prompts: sum(len(answer.token_ids) for answer in llm.generate(prompts, sampling)))


def _logits(race: Race) -> torch.Tensor | None:
    """kvarn's, behind the first prompt."""
    sizes = race.bench.sizes
    with (
        race.attempt(f"{KVARN}: logits"),
        load(race.model, race.bench.clock.device, sizes, weights="bf16", kv_type=sizes.kv_type) as loaded,
    ):
        return loaded.logits(race.prompts(0)[0])
    return None


def _transformers(race: Race, logits: torch.Tensor | None) -> None:
    sizes = race.bench.sizes
    with race.attempt("transformers: load"):
        twin = transformers_model(race.model, race.settings, race.bench.device, getattr(torch, sizes.dtype))
        if logits is not None:
            with race.attempt("the same logits"):
                race.bench.add(_same_logits(race, twin, logits))
        with race.attempt(CONTINUOUS):
            run, end = continuous(twin, sizes)
            try:
                race.run(CONTINUOUS, run, **_installed())
            finally:
                end()
        release()
        with race.attempt(STATIC):
            race.run(STATIC, static(twin, sizes.streams), **_installed())


def _installed() -> dict[str, Any]:
    """What transformers had to run on."""
    import transformers

    return {"transformers": transformers.__version__, **{name: find_spec(name) is not None for name in FASTER}}


def _same_logits(race: Race, twin: Any, logits: torch.Tensor) -> Row:
    theirs = twin(torch.tensor([race.prompts(0)[0]], device=twin.device)).logits[0, -1].double().cpu()
    error = float((logits.double() - theirs).norm() / theirs.norm())
    return Row("streams", f"{race.name}: logits against transformers'", error, "of their size",
               judged="off by", figure=error, wanted=ALIKE)  # fmt: skip


def _compare(race: Race) -> None:
    """The first model's ratio to continuous batching is judged."""
    for other in (CONTINUOUS, STATIC):
        what = f"{race.name}: {KVARN} against {other}"
        if KVARN not in race.rates or other not in race.rates:
            race.bench.add(Row("streams", what, failed="one of the two was not measured"))
            continue
        ratio = race.rates[KVARN] / race.rates[other]
        wanted = SPEED if other == CONTINUOUS and race.bench.is_first(race.name) else None
        race.bench.add(Row("streams", what, ratio, "times", judged="times as many tokens", figure=ratio, wanted=wanted))


def static(twin: Any, streams: Streams) -> Run:
    """`generate` with a static cache, whose forward transformers compiles by itself on a card."""
    from transformers import GenerationConfig

    asked = GenerationConfig(
        max_new_tokens=streams.output, min_new_tokens=streams.output, do_sample=False, cache_implementation="static",
        pad_token_id=0,
    )  # fmt: skip

    def run(prompts: Prompts) -> int:
        ids = torch.tensor(prompts, device=twin.device)
        out = twin.generate(ids, attention_mask=torch.ones_like(ids), generation_config=asked)
        return int(out.numel() - ids.numel())

    return run


def continuous(twin: Any, sizes: Sizes) -> tuple[Run, Callable[[], None]]:
    """`generate_batch`, its manager and graphs kept from call to call; and what ends them.

    By default it takes flash attention where a package for it is installed, and its own sizes of cache and steps.
    """
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR + 1)
    asked = GenerationConfig(max_new_tokens=sizes.streams.output, do_sample=False, eos_token_id=-1, pad_token_id=0)
    config = ContinuousBatchingConfig(**sizes.continuous)
    before = twin.config._attn_implementation

    def run(prompts: Prompts) -> int:
        answers = twin.generate_batch(
            prompts, generation_config=asked, continuous_batching_config=config, progress_bar=False,
            persistent_manager=True,
        )  # fmt: skip
        wrong = [answer.error for answer in answers.values() if answer.error]
        if wrong or len(answers) != len(prompts):
            raise RuntimeError(f"{len(answers)} of {len(prompts)} answered, {wrong[:1]}")
        return sum(len(answer.generated_tokens) for answer in answers.values())

    def end() -> None:
        twin.destroy_cached_continuous_batching_manager()
        twin.set_attn_implementation(before)

    return run, end
