"""All of it in order: prompts, answers, draft vocabulary, training, file."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvarn.config import CacheConfig, EngineConfig, SchedulerConfig
from kvarn.engine import LoadedEngine, build_engine
from kvarn.engine.loadable import LoadableModel
from kvarn.errors import ConfigError, TemplateError
from kvarn.models import load_model
from kvarn.program import Program
from kvarn.spec.heads import Heads, HeadsShape, Training, save_heads
from kvarn.text import Tokenizer, load_tokenizer
from kvarn.training.batches import Window, windows_of
from kvarn.training.collect import HELD_OUT_EVERY, Recorder, collect
from kvarn.training.prompts import Prompts, read_prompts
from kvarn.training.store import Text, TextStore
from kvarn.training.target import Target, layer_sizes
from kvarn.weights import open_model

COLLECT_SHARE = 0.3
"""Of the time, for the model's answers."""
EAGLE_WINDOW = 128
CONTEXT = {"medusa": 0, "eagle": 32}
"""Rows of a prompt before its answer that a window begins with."""
LENGTH = {"medusa": 64, "eagle": 128}
ANCHORS = 1024
"""Places in a step of the training."""
MOST_AHEAD = 8

Told = Callable[[str, float], None]
"""Told what is being done, and which share of it is."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What to train, on what, how long."""

    kind: str
    data: Path
    out: Path
    work: Path
    """Folder of answers and checkpoint."""
    minutes: float = 28.0
    steps: int | None = None
    """Of the training, instead of minutes; then answers are collected until the prompts or the space are used up."""
    ahead: int = 3
    """Tokens guessed ahead."""
    draft_vocab: int = 4096
    max_tokens: int = 256
    temperature: float = 0.7
    data_bytes: int = 2 << 30
    max_num_seqs: int = 16
    threads: int = 0
    seed: int = 0
    rate: float = 1e-3
    resume: bool = False

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("minutes", self.minutes, 0.0, 1e5),
            ("steps", self.steps or 1, 1, 1 << 32),
            ("ahead", self.ahead, 1, MOST_AHEAD),
            ("draft-vocab", self.draft_vocab, 16, 1 << 20),
            ("max-tokens", self.max_tokens, 4, 1 << 16),
            ("temperature", self.temperature, 0.0, 2.0),
            ("seqs", self.max_num_seqs, 1, 1024),
            ("rate", self.rate, 0.0, 1.0),
        ):
            if not low <= value <= high:
                raise ConfigError(f"--{name} must be between {low} and {high}, not {value}")


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of it. texts: answers, held-out ones among them."""

    heads: Heads
    texts: int
    answer_tokens: int
    coverage: float
    """Share of the held-out answers' tokens that heads can say."""


def train_heads(model: Path, settings: TrainSettings, told: Told = lambda _what, _share: None) -> Trained:
    """Trains heads for the model in files and saves them.

    Raises ConfigError for settings and data, and what opening and running a model raises.
    """
    with open_model(model) as files:
        return train(load_model(files), load_tokenizer(files), settings, told)


def train(model: LoadableModel, tokenizer: Tokenizer, settings: TrainSettings, told: Told) -> Trained:
    """The same for a model that is open."""
    from kvarn.training.learn import Learner, Schedule

    target = Target(model.program, model.weights)
    prompts = read_prompts(settings.data)
    identity: dict[str, object] = {
        "target": target.key, "data": prompts.sha256, "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
    }  # fmt: skip
    store = TextStore(settings.work, target.hidden_size, settings.data_bytes, identity)
    _collect(model, tokenizer, prompts, store, settings, told)
    texts = sorted(store.texts, key=lambda text: text.number)
    learned = [text for text in texts if text.number % HELD_OUT_EVERY]
    held_out = [text for text in texts if text.number % HELD_OUT_EVERY == 0]
    ids = draft_vocabulary(store, learned, min(settings.draft_vocab, target.program.vocab_size))
    shape = heads_shape(settings.kind, target, ids.size, settings.ahead)

    length = LENGTH[settings.kind]
    schedule = Schedule(
        settings.steps, 60 * settings.minutes * (1 - COLLECT_SHARE), ANCHORS // length, length, settings.ahead,
        settings.rate, settings.seed,
    )  # fmt: skip
    key = _key({**identity, **asdict(shape), **asdict(schedule), "seconds": 0, "kind": settings.kind}, ids)
    learner = Learner(settings.kind, shape, target, ids, schedule, key)
    checkpoint = settings.work / f"{settings.kind}.checkpoint.safetensors"
    if settings.resume and checkpoint.exists():
        learner.resume(checkpoint)
    windows = windows_of(learned, length, CONTEXT[settings.kind])
    learner.train(store, windows, checkpoint, lambda share: told("training", share))
    measured = learner.acceptance(store, _some(windows_of(held_out, length, CONTEXT[settings.kind])))
    progress = learner.progress
    training = Training(prompts.sha256, progress.tokens, progress.step, measured)
    heads = Heads(settings.kind, target.key, shape, training, ids, learner.tensors())
    save_heads(settings.out, heads)
    answers = sum(text.length - text.prompt_length for text in texts)
    return Trained(heads, len(texts), answers, _coverage(store, held_out, ids))


def _collect(
    model: LoadableModel,
    tokenizer: Tokenizer,
    prompts: Prompts,
    store: TextStore,
    settings: TrainSettings,
    told: Told,
) -> None:
    """Fills the store with what is missing: all prompts' answers, or as many as there are time and room for."""
    known = {text.number for text in store.texts}
    missing = [number for number in range(len(prompts.texts)) if number not in known]
    seconds = 60 * settings.minutes * COLLECT_SHARE
    collected = settings.work / "seconds"
    spent = float(collected.read_text()) if collected.exists() else 0.0
    if not missing or (settings.steps is None and spent >= seconds):
        return
    recorders: list[Recorder] = []

    def new_drafter(program: Program) -> Recorder:
        recorders.append(Recorder(program, store))
        return recorders[0]

    engine = _engine(model, tokenizer, settings, new_drafter)
    (recorder,), started = recorders, time.monotonic()
    most = engine.max_model_len - settings.max_tokens
    tokens = _tokenized(prompts, tokenizer, most)
    begun = len(known)

    def enough() -> bool:
        return settings.steps is None and spent + time.monotonic() - started >= seconds

    def progress(_generated: int) -> None:
        by_time = (spent + time.monotonic() - started) / max(seconds, 1e-9) if settings.steps is None else 0.0
        by_count = (len(store.texts) - begun) / len(missing)
        told("collecting answers", min(1.0, max(by_time, by_count)))

    try:
        collect(
            engine.core, recorder, tokens, missing, max_tokens=settings.max_tokens, temperature=settings.temperature,
            max_num_seqs=settings.max_num_seqs, enough=enough, progress=progress,
        )  # fmt: skip
    finally:
        engine.core.close()
        collected.write_text(str(spent + time.monotonic() - started), encoding="utf-8")
        gc.collect()


def _engine(
    model: LoadableModel,
    tokenizer: Tokenizer,
    settings: TrainSettings,
    new_drafter: Callable[[Program], Recorder],
) -> LoadedEngine:
    longest = min(model.program.max_positions, 4 * settings.max_tokens + 1024)
    config = EngineConfig(
        max_model_len=longest,
        threads=settings.threads,
        cache=CacheConfig(enable_prefix_caching=False),
        scheduler=SchedulerConfig(settings.max_num_seqs, max(256, settings.max_num_seqs)),
    )
    return build_engine(model, tokenizer, config, new_drafter=new_drafter)


def _tokenized(prompts: Prompts, tokenizer: Tokenizer, most: int) -> Callable[[int], Sequence[int]]:
    """Prompts by number. One that is too long is cut: what matters is that the model talks."""
    if most < 1:
        raise ConfigError("--max-tokens leaves no room for prompts in the model's length")

    def tokens(number: int) -> Sequence[int]:
        try:
            return prompts.token_ids(tokenizer, number)[-most:]
        except TemplateError as error:
            raise ConfigError(f"--data: prompt {number + 1}: {error}") from error

    return tokens


def draft_vocabulary(store: TextStore, texts: Sequence[Text], size: int) -> NDArray[np.int32]:
    """The tokens most often said in answers, ascending; of equals, and where there are fewer, those with small ids."""
    if not texts:
        raise ConfigError("--data: no answers to train on; give more prompts or minutes")
    said = np.concatenate([store.tokens[t.start + t.prompt_length : t.start + t.length] for t in texts])
    counts = np.bincount(said, minlength=size)
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def heads_shape(kind: str, target: Target, draft_vocab: int, ahead: int) -> HeadsShape:
    """Sizes of heads for a model."""
    eps = target.norm.eps
    shape = HeadsShape(target.hidden_size, target.program.vocab_size, draft_vocab, ahead, norm_eps=eps)
    if kind == "medusa":
        return shape
    sizes = layer_sizes(target)
    return replace(
        shape, num_heads=sizes.num_heads, num_kv_heads=sizes.num_kv_heads, head_dim=sizes.head_dim,
        intermediate_size=sizes.intermediate_size, window=EAGLE_WINDOW, rope_theta=sizes.rope_theta,
    )  # fmt: skip


def _coverage(store: TextStore, texts: Sequence[Text], ids: NDArray[np.int32]) -> float:
    parts = [store.tokens[t.start + t.prompt_length : t.start + t.length] for t in texts]
    said = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    return float(np.isin(said, ids).mean()) if said.size else 0.0


def _some(windows: Sequence[Window], most: int = 512) -> Sequence[Window]:
    """No more than `most` of them, spread evenly."""
    return windows if len(windows) <= most else [windows[i * len(windows) // most] for i in range(most)]


def _key(values: dict[str, object], ids: NDArray[np.int32]) -> str:
    said = json.dumps(values, sort_keys=True).encode() + ids.tobytes()
    return hashlib.sha256(said).hexdigest()
