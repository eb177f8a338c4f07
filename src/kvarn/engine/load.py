"""From a model's name or path to an engine that is ready to step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from kvarn import __version__, _native
from kvarn.backends import Backend, KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.cpu import CpuBackend, PackedSlot
from kvarn.cache import BlockPool, NullPrefixCache, RadixPrefixCache
from kvarn.config import EngineConfig
from kvarn.engine.core import EngineCore
from kvarn.engine.prefixes import shared_prefixes
from kvarn.engine.tier import open_tier
from kvarn.errors import ConfigError
from kvarn.models import Model, ModelConfig, load_model
from kvarn.planning import Available, MemoryPlan, available_memory, plan_memory
from kvarn.program import Program
from kvarn.runner import Drafter, MoveSeconds, Runner
from kvarn.sampling import NativeSampler
from kvarn.scheduler import MeasuredCost, MoveCost, Observer, Scheduler, make_scheduler
from kvarn.spec import HeadModel, make_drafter, open_heads
from kvarn.tensors import TensorSource
from kvarn.text import Tokenizer, load_tokenizer
from kvarn.weights import ModelFiles, open_model, packed_cache
from kvarn.weights.fingerprint import fingerprint


class LoadableModel(Protocol):
    """What an engine is built from: `kvarn.models.Model`, or a model that a test made in memory."""

    @property
    def config(self) -> ModelConfig:
        """Sizes and ids."""
        ...

    @property
    def program(self) -> Program:
        """What runs."""
        ...

    @property
    def weights(self) -> TensorSource:
        """Where its weights come from."""
        ...


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """Seconds that the parts of a load took."""

    open: float
    """Resolving the name, mapping the files, building and checking the program."""
    tokenizer: float
    weights: float
    """Mapping packed weights, or packing them; allocating the rest."""


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """A core and what its fronts tell about it. The front that takes it owns the core and closes it."""

    core: EngineCore
    name: str
    tokenizer: Tokenizer
    model_config: ModelConfig
    max_model_len: int
    config: EngineConfig
    memory_plan: MemoryPlan | None = None
    load_times: LoadTimes | None = None
    """Both None where the engine was put together by hand."""
    move_seconds: MoveSeconds | None = None
    """What moving a block, of one KV group, to and from the second tier takes; None where there is none."""


def make_backend(name: str, threads: int = 0, packed: PackedSlot | None = None) -> Backend:
    """The back-end of that name. threads and packed: see `CpuBackend`. Raises ConfigError."""
    if name == "cpu":
        return CpuBackend(threads=threads, packed=packed)
    if name == "reference":
        from kvarn.backends.reference import ReferenceBackend

        return ReferenceBackend()
    raise ConfigError(f"backend must be cpu or reference, not {name!r}")


OnPlan = Callable[[MemoryPlan], None]
NewDrafter = Callable[[Program], Drafter]


def load_engine(
    name_or_path: str,
    config: EngineConfig,
    *,
    on_plan: OnPlan = lambda _plan: None,
    observer: Observer | None = None,
) -> LoadedEngine:
    """Resolves the name (pulling the model where it is not there yet), opens its files and builds the engine.

    on_plan: told what the engine will take, before weights are read. observer: told of every decision and step.

    Raises ModelFileError, UnsupportedModelError, PullError, ConfigError, CapacityError.
    """
    from kvarn.weights import catalog

    times = [time.perf_counter()]
    path = catalog.resolve(name_or_path)
    files = open_model(path)
    try:
        model = load_model(files, config.max_model_len)
        times.append(time.perf_counter())
        tokenizer = load_tokenizer(files)
        times.append(time.perf_counter())
        packed = _packed_slot(files, model, config)
        name, identity = model_name(name_or_path), _model_identity(files, model)
        engine = build_engine(
            model, tokenizer, config, name=name, packed=packed, identity=identity,
            on_plan=on_plan, observer=observer, on_close=files.close,
        )  # fmt: skip
        files.release()
        _native.trim_heap()  # of what building a tokenizer takes, half is needed afterwards
        times.append(time.perf_counter())
        return replace(engine, load_times=LoadTimes(*(end - start for start, end in pairwise(times))))
    except BaseException:
        files.close()
        raise


def _packed_slot(files: ModelFiles, model: Model, config: EngineConfig) -> PackedSlot | None:
    """Where the model's packed weights lie; None where none are kept."""
    limit = packed_cache.limit_bytes(config.packed_cache_bytes)
    sources = files.sources()
    if not limit or not sources or config.backend != "cpu":
        return None
    path = packed_cache.packed_path(files.path)
    key = _model_identity(files, model)

    def admit(size: int) -> bool:
        return all(source.unchanged() for source in sources) and packed_cache.make_room(path, size, limit)

    return PackedSlot(path, key, admit)


def _model_identity(files: ModelFiles, model: Model) -> str:
    """Changes with everything between the files' bytes and the weights that are packed."""
    # The version stands for the code between the files and the packing, the recipe for what it does with each tensor.
    parts = (__version__, fingerprint(files.sources()), model.weights.recipe())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def model_name(name_or_path: str) -> str:
    """What a model goes by: a known name as it is; a path without its folders, a file's without its suffix."""
    path = Path(name_or_path).expanduser()
    if not path.exists():
        return name_or_path
    return path.resolve().name if path.is_dir() else path.stem


def build_engine(
    model: LoadableModel,
    tokenizer: Tokenizer,
    config: EngineConfig,
    *,
    name: str = "model",
    packed: PackedSlot | None = None,
    identity: str = "",
    new_drafter: NewDrafter | None = None,
    on_plan: OnPlan = lambda _plan: None,
    observer: Observer | None = None,
    on_close: Callable[[], None] = lambda: None,
) -> LoadedEngine:
    """Sizes the cache, loads the program on the back-end, and puts the engine together.

    identity: tells the model's weights from all others, for KV that outlives the engine; needed for kv_offload_bytes.
    new_drafter: makes the drafter of the program, in place of the one that config.speculative asks for: for those who
    want to see hidden states.
    The weights must stay open until `on_close` is called, when the engine is closed: a back-end may read them late.
    on_plan: told what the engine will take, before weights are read. observer: told of every decision and step.
    Raises CapacityError before any weight is read.
    """
    program = model.program
    backend = make_backend(config.backend, config.threads, packed)
    heads = open_heads(config.speculative, program, model.weights)
    watching = None if new_drafter is None else new_drafter(program)
    memory = engine_memory(model, config, backend, available_memory(), heads)
    shared = shared_prefixes(tokenizer, config.cache, memory.num_blocks, memory.windows)
    on_plan(memory)
    limits = memory.limits if heads is None else heads.target_limits(memory.limits)
    executable = backend.load(program, model.weights, memory.kv, limits)
    if watching is not None:
        drafter = watching
    elif heads is not None:
        drafter = heads.load(backend, executable, memory.kv, limits)
    else:
        drafter = make_drafter(config.speculative)
    tier = open_tier(config, program, executable, identity)
    ends = dict.fromkeys((*model.config.eos_token_ids, *tokenizer.eos_token_ids))

    cost = MeasuredCost()
    seconds, groups = tier.move_seconds, len(program.kv_groups)  # the KV of a block's tokens is a block of each group
    moves = MoveCost(memory.block_size, groups * seconds.save, groups * seconds.load, cost)

    def new_scheduler() -> Scheduler:
        pool = BlockPool(memory.num_blocks, memory.block_size, memory.windows)
        caching = config.cache.enable_prefix_caching
        prefixes = RadixPrefixCache(pool, shared, tier.new_index()) if caching else NullPrefixCache()
        return make_scheduler(
            config.scheduler, pool, memory.max_model_len, cost,
            eos_token_ids=ends, prefix_cache=prefixes, moves=moves, observer=observer, speculative=config.speculative,
        )  # fmt: skip

    sampler = NativeSampler(program.vocab_size)
    runner = Runner(
        executable, sampler, memory.limits, memory.block_size, logits=program.output, block_file=tier.file,
        drafter=drafter,
    )  # fmt: skip
    core = EngineCore(
        runner, new_scheduler, tokenizer, program.vocab_size, cost=cost, observer=observer, on_close=on_close
    )
    moving = seconds if tier.file is not None else None
    return LoadedEngine(
        core, name, tokenizer, model.config, memory.max_model_len, config, memory, move_seconds=moving
    )


def engine_memory(
    model: LoadableModel,
    config: EngineConfig,
    backend: Backend,
    available: Available,
    heads: HeadModel | None = None,
) -> MemoryPlan:
    """What an engine of the model takes on the back-end, with the heads that run beside it.

    Raises CapacityError, ConfigError (see `plan_memory`).
    """
    program = model.program
    dtypes = {weight.name: model.weights.tensor(weight.name).dtype for weight in program.weights}

    def uses(kv: KvCacheSpec, limits: StepLimits) -> MemoryUse:
        if heads is None:
            return backend.memory_use(program, dtypes, kv, limits)
        limits = heads.target_limits(limits)
        return backend.memory_use(program, dtypes, kv, limits) + heads.memory_use(backend, kv, limits)

    return plan_memory(program, uses, config, available)
