"""How long steps of many shapes take in the engine, scheduler and sampler among them: what cost models are fit to."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvarn.config import CacheConfig, EngineConfig, SchedulerConfig
from kvarn.engine import EngineCore, load_engine
from kvarn.errors import ConfigError
from kvarn.request import Request, SamplingParams
from kvarn.scheduler import NullObserver, StepShape, StepTimes
from kvarn.step import SchedulerOutput

BLOCK_SIZE = 16
DECODES = 12
"""Tokens that each sequence of a batch gets."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A step's shape and the median of its wall times."""

    shape: StepShape
    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """Requests that come together: the lengths of their prompts, and how many tokens each gets."""

    prompts: tuple[int, ...]
    output: int


class _StepLog(NullObserver):
    """Keeps shapes and times of steps."""

    def __init__(self) -> None:
        self.steps: list[tuple[StepShape, float]] = []

    def stepped(self, scheduled: SchedulerOutput, times: StepTimes) -> None:
        if scheduled.sequences:
            self.steps.append((StepShape.of(scheduled), times.ended - times.began))


def step_work(max_num_tokens: int, max_num_seqs: int, max_model_len: int) -> list[Work]:
    """Prompts of 1, 2, 4, … tokens, batches of 1, 2, 4, … decodes at several depths, and both together."""
    longest = max_model_len - DECODES
    if longest < max_num_tokens:
        raise ConfigError(f"--tokens must be at most {longest}, what a sequence of the model has room for")
    works = [Work((tokens,), 1) for tokens in _doubling(max_num_tokens)]
    works += [Work((min(4 * max_num_tokens, longest),), 1)]
    for batch in _doubling(max_num_seqs):
        works += [Work((depth,) * batch, DECODES) for depth in (16, 256) if depth <= longest]
    for batch in _doubling(min(4, max_num_seqs)):
        works.append(Work((min(2048, longest),) * batch, DECODES))
    if max_num_seqs > 8:
        works.append(Work((*(32,) * 8, min(2 * max_num_tokens, longest)), DECODES))
    return works


def measure_steps(
    path: Path,
    *,
    threads: int,
    max_num_tokens: int,
    max_num_seqs: int,
    rounds: int,
    progress: Progress = lambda _done, _total: None,
) -> list[MeasuredStep]:
    """Times every step of the work, `rounds` times after a round that warms up."""
    log = _StepLog()
    cache = CacheConfig(enable_prefix_caching=False)
    config = EngineConfig(threads=threads, scheduler=SchedulerConfig(max_num_seqs, max_num_tokens), cache=cache)
    engine = load_engine(str(path), config, observer=log)
    try:
        works = step_work(max_num_tokens, max_num_seqs, engine.max_model_len)
        shapes: list[StepShape] = []
        times: list[list[float]] = []
        total = (rounds + 1) * len(works)
        progress(0, total)
        for number in range(rounds + 1):
            log.steps.clear()
            for place, work in enumerate(works):
                _run(engine.core, work, number * len(works) + place, engine.model_config.vocab_size)
                progress(number * len(works) + place + 1, total)
            if number:
                shapes = [shape for shape, _ in log.steps]
                times.append([seconds for _, seconds in log.steps])
        medians = (statistics.median(column) for column in zip(*times, strict=True))
        return [MeasuredStep(shape, seconds) for shape, seconds in zip(shapes, medians, strict=True)]
    finally:
        engine.core.close()


@dataclass(frozen=True, slots=True)
class KvMoves:
    """What a token takes in the KV cache, and how fast it goes to a second tier or comes back."""

    bytes_per_token: int
    move_bandwidth: float
    """Bytes a second: the mean of saving and loading, checksums included."""


def measure_kv(path: Path) -> KvMoves:
    """Moves a block of the model's cache to a file and back, as an engine does at its start."""
    with tempfile.TemporaryDirectory() as folder:
        cache = CacheConfig(kv_offload_bytes=1 << 26, kv_offload_dir=folder)
        config = EngineConfig(max_model_len=cache.block_size, scheduler=SchedulerConfig(1, 1), cache=cache)
        engine = load_engine(str(path), config)
        try:
            memory, moves = engine.memory_plan, engine.move_seconds
            assert memory is not None and moves is not None
            block = memory.use.kv_cache // memory.num_blocks
            return KvMoves(block * len(memory.windows) // cache.block_size, 2 * block / sum(moves))
        finally:
            engine.core.close()


def by_shape(steps: Sequence[MeasuredStep]) -> list[tuple[str, MeasuredStep]]:
    """Steps of one prompt and of decodes alone, one of each size, named."""
    named: dict[str, MeasuredStep] = {}
    for step in steps:
        shape = step.shape
        if shape.num_tokens == shape.num_sequences == shape.num_sampled and shape.num_context < 64 * shape.num_tokens:
            named.setdefault(f"decode, batch {shape.num_tokens}", step)
        elif shape.num_sequences == 1 and shape.num_context == shape.num_tokens:
            named.setdefault(f"prompt of {shape.num_tokens}", step)
    return sorted(named.items(), key=lambda item: (item[0].split()[0], item[1].shape.num_tokens))


def _run(core: EngineCore, work: Work, number: int, vocab_size: int) -> None:
    """Adds the prompts, and steps until their answers have ended."""
    for index, length in enumerate(work.prompts):
        first = (number * 4099 + index * 13 + 1) % vocab_size
        prompt = tuple((first + (7 + number) * position) % vocab_size for position in range(length))
        sampling = SamplingParams(temperature=0.0, max_tokens=work.output, ignore_eos=True)
        core.add(Request(f"{number}-{index}", prompt, sampling))
    while core.has_work():
        core.step()


def _doubling(most: int) -> Iterator[int]:
    number = 1
    while number < most:
        yield number
        number *= 2
    yield most
