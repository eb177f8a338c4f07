"""Many requests at once on the same weights: kvarn's engine, and transformers in its two fast ways."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu_parts.engines import engine
from gpu_parts.loaded import load
from gpu_parts.random_models import random_model, transformers_model
from gpu_parts.results import Results, Row, Wanted, release
from gpu_parts.shapes import Sizes, Streams
from gpu_parts.timing import Clock
from kvarn.models.in_memory import InMemoryModel
from kvarn.request import SamplingParams

SPEED = Wanted(least=2.0)
ALIKE = Wanted(most=0.1)
"""Of the logits' difference to transformers', as a share of their size: two roundings of bf16 through all layers."""
ROUNDS = 3
KVARN, STATIC, CONTINUOUS = "kvarn", "transformers, static cache, compiled", "transformers, continuous batching"
Prompts = list[list[int]]
Run = Callable[[Prompts], int]
"""Answers all prompts and returns the number of tokens said."""


def measure_streams(results: Results, clock: Clock, sizes: Sizes) -> None:
    """Each model: greedy answers of one length to prompts of one length, the engines one after the other."""
    for name, settings in sizes.models.items():
        model = random_model(settings, str(clock.device))
        rates: dict[str, float] = {}
        _kvarn(results, clock, sizes, name, model, rates)
        release()
        logits = _logits(results, clock, sizes, name, model)
        release()
        _transformers(results, clock, sizes, name, model, settings, rates, logits)
        release()
        _compare(results, sizes, name, rates)


def prompts_of(sizes: Sizes, vocab_size: int, seed: int) -> Prompts:
    """Random ones: other ones for each seed, so that no engine finds what it has computed before."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes.streams.count, sizes.streams.prompt)
    ids: Prompts = torch.randint(3, vocab_size, shape, generator=generator).tolist()
    return ids


def _kvarn(
    results: Results, clock: Clock, sizes: Sizes, name: str, model: InMemoryModel, rates: dict[str, float]
) -> None:
    with results.attempt("streams", f"{name}, {KVARN}"), engine(model, clock.device, sizes) as llm:
        sampling = SamplingParams(temperature=0.0, max_tokens=sizes.streams.output, ignore_eos=True)

        def run(prompts: Prompts) -> int:
            return sum(len(answer.token_ids) for answer in llm.generate(prompts, sampling))

        _rate(results, clock, sizes, name, KVARN, run, model.config.vocab_size, rates)


def _logits(results: Results, clock: Clock, sizes: Sizes, name: str, model: InMemoryModel) -> torch.Tensor | None:
    """kvarn's, behind the first prompt."""
    with (
        results.attempt("streams", f"{name}, {KVARN}: logits"),
        load(model, clock.device, sizes, weights="bf16", kv_type=sizes.kv_type) as loaded,
    ):
        return loaded.logits(prompts_of(sizes, model.config.vocab_size, 0)[0])
    return None


def _transformers(
    results: Results,
    clock: Clock,
    sizes: Sizes,
    name: str,
    model: InMemoryModel,
    settings: dict[str, Any],
    rates: dict[str, float],
    logits: torch.Tensor | None,
) -> None:
    with results.attempt("streams", f"{name}, transformers: load"):
        twin = transformers_model(model, settings, str(clock.device), getattr(torch, sizes.dtype))
        vocab = model.config.vocab_size
        if logits is not None:
            with results.attempt("streams", f"{name}: the same logits"):
                _same_logits(results, name, twin, prompts_of(sizes, vocab, 0)[0], logits)
        with results.attempt("streams", f"{name}, {CONTINUOUS}"):
            run, end = continuous(twin, sizes)
            try:
                _rate(results, clock, sizes, name, CONTINUOUS, run, vocab, rates)
            finally:
                end()
        release()
        with results.attempt("streams", f"{name}, {STATIC}"):
            _rate(results, clock, sizes, name, STATIC, static(twin, sizes.streams), vocab, rates)


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


def _rate(
    results: Results,
    clock: Clock,
    sizes: Sizes,
    name: str,
    engine_name: str,
    run: Run,
    vocab_size: int,
    rates: dict[str, float],
) -> None:
    """Tokens a second: the median of some rounds after one that compiles and warms up."""
    streams = sizes.streams
    found = []
    for number in range(1 + (ROUNDS if clock.cuda else 1)):
        prompts = prompts_of(sizes, vocab_size, number)
        clock.synchronize()
        started = time.perf_counter()
        tokens = run(prompts)
        clock.synchronize()
        seconds = time.perf_counter() - started
        if tokens != streams.count * streams.output:
            raise RuntimeError(f"{tokens} tokens came, not {streams.count * streams.output}")
        if number:
            found.append(tokens / seconds)
    rates[engine_name] = statistics.median(found)
    results.point("streams", model=name, engine=engine_name, rate=rates[engine_name], count=streams.count)
    results.add(Row("streams", f"{name}, {engine_name}", rates[engine_name], "tokens/s", detail={"rounds": found}))


def _same_logits(results: Results, name: str, twin: Any, prompt: list[int], logits: torch.Tensor) -> None:
    theirs = twin(torch.tensor([prompt], device=twin.device)).logits[0, -1].double().cpu()
    error = float((logits.double() - theirs).norm() / theirs.norm())
    results.add(
        Row("streams", f"{name}: logits against transformers'", error, "of their size",
            judged="off by", figure=error, wanted=ALIKE)
    )  # fmt: skip


def _compare(results: Results, sizes: Sizes, name: str, rates: dict[str, float]) -> None:
    """The first model's ratio to continuous batching is judged."""
    for other in (CONTINUOUS, STATIC):
        what = f"{name}: {KVARN} against {other}"
        if KVARN not in rates or other not in rates:
            results.add(Row("streams", what, failed="one of the two was not measured"))
            continue
        ratio = rates[KVARN] / rates[other]
        judged = other == CONTINUOUS and name == next(iter(sizes.models))
        results.add(
            Row("streams", what, ratio, "times", judged="times as many tokens", figure=ratio,
                wanted=SPEED if judged else None)
        )  # fmt: skip
