"""From a model's name or path to an engine that is ready to step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from kvarn import __version__, _native
from kvarn.backends import Backend, Executable, KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.ahead import AheadExecutable
from kvarn.backends.cpu import CpuExecutable, PackedSlot
from kvarn.cache import BlockPool, NullPrefixCache, RadixPrefixCache
from kvarn.config import CacheConfig, EngineConfig
from kvarn.engine.backends import backend_memory, engine_backend
from kvarn.engine.commit import MemoryCommit
from kvarn.engine.core import EngineCore
from kvarn.engine.loadable import LoadableModel, stored_types
from kvarn.engine.prefixes import shared_prefixes
from kvarn.engine.tier import open_tier
from kvarn.grammar import GrammarCompiler, GrammarMasks, GrammarVocabulary
from kvarn.kv_types import KV_TYPES
from kvarn.models import Model, ModelConfig, load_model
from kvarn.planning import Available, MemoryPlan, Uses, available_memory, plan_memory
from kvarn.program import Program
from kvarn.runner import Ahead, Drafter, HiddenStatePooler, MoveSeconds, Runner, StepsAhead
from kvarn.sampling import NativeSampler, RuleBook, Sampler
from kvarn.scheduler import MeasuredCost, MoveCost, Observer, Scheduler, make_scheduler
from kvarn.spec import make_drafter, open_heads
from kvarn.text import Tokenizer, load_spellings, load_tokenizer, spellings
from kvarn.weights import ModelFiles, open_model, packed_cache
from kvarn.weights.fingerprint import fingerprint

if TYPE_CHECKING:
    from kvarn.engine.draft import DraftModel
    from kvarn.spec.head_model import HeadModel


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


OnPlan = Callable[[MemoryPlan], None]
NewDrafter = Callable[[Program], Drafter]


def load_engine(
    name_or_path: str,
    config: EngineConfig,
    *,
    on_plan: OnPlan = lambda _plan: None,
    observer: Observer | None = None,
    available: Available | None = None,
) -> LoadedEngine:
    """Resolves the name (pulling the model where it is not there yet), opens its files and builds the engine.

    on_plan: told what the engine will take, before weights are read. observer: told of every decision and step.
    available: the memory that it may take its share of; None: what the machine has now.

    Raises ModelFileError, UnsupportedModelError, PullError, ConfigError, CapacityError.
    """
    from kvarn.weights import catalog

    times = [time.perf_counter()]
    path = catalog.resolve(name_or_path)
    files = open_model(path)
    draft: DraftModel | None = None
    try:
        model = load_model(files, config.max_model_len)
        times.append(time.perf_counter())
        tokenizer = load_tokenizer(files)
        times.append(time.perf_counter())
        packed = _packed_slot(files, model, config)
        name, identity = model_name(name_or_path), _model_identity(files, model)
        draft = open_draft(config)
        engine = build_engine(
            model, tokenizer, config, name=name, packed=packed, identity=identity, draft=draft,
            on_plan=on_plan, observer=observer, on_close=files.close, available=available,
        )  # fmt: skip
        files.release()
        _native.trim_heap()  # of what building a tokenizer takes, half is needed afterwards
        times.append(time.perf_counter())
        return replace(engine, load_times=LoadTimes(*(end - start for start, end in pairwise(times))))
    except BaseException:
        if draft is not None:
            draft.close()
        files.close()
        raise


def plan_engine(name_or_path: str, config: EngineConfig, available: Available) -> MemoryPlan:
    """What `load_engine` would take with so much memory; no weight is read. Raises what that raises."""
    from kvarn.weights import catalog

    files = open_model(catalog.resolve(name_or_path))
    draft: DraftModel | None = None
    try:
        model = load_model(files, config.max_model_len)
        draft = open_draft(config)
        heads = open_heads(config.speculative, model.program, model.weights)
        return engine_memory(model, config, engine_backend(config), available, draft, heads)
    finally:
        if draft is not None:
            draft.close()
        files.close()


def open_draft(config: EngineConfig) -> DraftModel | None:
    """The draft model that the settings name, pulled where it is not there yet, its files open and no weight read; None
    without one. Raises ModelFileError, UnsupportedModelError, PullError."""
    if config.speculative is None or config.speculative.source != "draft":
        return None
    from kvarn.engine.draft import DraftModel
    from kvarn.weights import catalog

    name = config.speculative.model
    files = open_model(catalog.resolve(name))
    try:
        model = load_model(files, config.max_model_len)
        vocab = config.speculative.draft_vocab
        packed = _packed_slot(files, model, config, f"draft_vocab={vocab}" if vocab else "")
        backend = engine_backend(config, packed)
        return DraftModel(model, load_spellings(files), backend, model_name(name), files.close, vocab)
    except BaseException:
        files.close()
        raise


def _packed_slot(files: ModelFiles, model: Model, config: EngineConfig, part: str = "") -> PackedSlot | None:
    """Where the model's packed weights lie; None where none are kept. part: see `packed_path`."""
    limit = packed_cache.limit_bytes(config.packed_cache_bytes)
    sources = files.sources()
    if not limit or not sources or config.backend != "cpu":
        return None
    path = packed_cache.packed_path(files.path, part)
    key = _model_identity(files, model) + part

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
    draft: DraftModel | None = None,
    on_plan: OnPlan = lambda _plan: None,
    observer: Observer | None = None,
    on_close: Callable[[], None] = lambda: None,
    available: Available | None = None,
) -> LoadedEngine:
    """Sizes the cache, loads the program on the back-end, and puts the engine together.

    identity: tells the model's weights from all others, for KV that outlives the engine; needed for kv_offload_bytes.
    draft: guesses for it, for config.speculative with method draft; owned once the engine is built. new_drafter: makes
    the drafter of the program, in place of the one that config.speculative asks for: for those who want to see hidden
    states.
    The weights must stay open until `on_close` is called, when the engine is closed: a back-end may read them late.
    on_plan: told what the engine will take, before weights are read. observer: told of every decision and step.
    Raises CapacityError before any weight is read.
    """
    program = model.program
    backend = engine_backend(config, packed)
    heads = open_heads(config.speculative, program, model.weights)
    if draft is not None:
        draft.check(program, spellings(tokenizer.vocabulary), name, config.max_model_len)
    memory = engine_memory(model, config, backend, available or backend_memory(config), draft, heads)
    shared = shared_prefixes(tokenizer, config.cache, memory.num_blocks, memory.windows)
    on_plan(memory)
    limits = memory.limits if heads is None else heads.target_limits(memory.limits)
    executable = backend.load(program, model.weights, memory.kv, limits)
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
            reference_every=KV_TYPES[config.cache.dtype].reference_every,
        )  # fmt: skip

    grammars = GrammarCompiler(lambda: grammar_vocabulary(tokenizer, program.vocab_size, ends), config.grammar)
    sampler = NativeSampler(program.vocab_size, _pool_of(executable))
    runner = Runner(
        executable, sampler, memory.limits, memory.block_size, logits=program.output, block_file=tier.file,
        drafter=(
            _drafter(config, draft, heads, memory, sampler, backend, executable)
            if new_drafter is None
            else new_drafter(program)
        ),
        grammars=GrammarMasks(grammars.find, program.vocab_size, ends),
        pooler=HiddenStatePooler(program, model.weights),
        ahead=None if config.speculative or new_drafter else _ahead(executable),
    )  # fmt: skip

    def close() -> None:
        if draft is not None:
            draft.close()
        on_close()

    core = EngineCore(
        runner, new_scheduler, tokenizer, program.vocab_size, cost=cost, observer=observer, grammars=grammars,
        idle=_idle_work(config.cache, memory, executable), on_close=close,
    )  # fmt: skip
    moving = seconds if tier.file is not None else None
    return LoadedEngine(
        core, name, tokenizer, model.config, memory.max_model_len, config, memory, move_seconds=moving
    )


def grammar_vocabulary(tokenizer: Tokenizer, vocab_size: int, ends: Iterable[int]) -> GrammarVocabulary:
    """The vocabulary of a tokenizer as grammars need it. vocab_size: of the logits. ends: tokens that end an answer."""
    special = frozenset(tokenizer.vocabulary.special)
    tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
    # Where the vocabulary itself puts a space before a text, what it encodes to is not what follows in one.
    encode = None if tokenizer.strips_leading_space else tokenizer.encode
    return GrammarVocabulary(tokens, frozenset(t for t in special if t < vocab_size), tuple(ends), encode)


def _drafter(
    config: EngineConfig,
    draft: DraftModel | None,
    heads: HeadModel | None,
    memory: MemoryPlan,
    sampler: Sampler,
    backend: Backend,
    executable: Executable,
) -> Drafter:
    """The drafter that the settings ask for, its model or heads loaded beside the executable."""
    chosen, program = config.speculative, executable.program
    if chosen is not None and draft is not None:
        return make_drafter(chosen, lambda: draft.load(memory, sampler, program.vocab_size, chosen))
    if chosen is not None and heads is not None:
        return make_drafter(chosen, lambda: heads.load(backend, executable, memory.kv, memory.limits))
    return make_drafter(chosen, logits=program.output)


def _pool_of(executable: Executable) -> Callable[[], _native.Pool | None]:
    """The threads that are idle between its steps, where there are any."""
    return lambda: executable.pool if isinstance(executable, CpuExecutable) else None


def _ahead(executable: Executable) -> Ahead | None:
    """What begins steps before their inputs are known here, where the back-end can; a drafter wants to know them."""
    if not isinstance(executable, AheadExecutable):
        return None
    return StepsAhead(executable, RuleBook(executable.program.vocab_size))


def _idle_work(cache: CacheConfig, memory: MemoryPlan, executable: Executable) -> Callable[[], bool]:
    """What the engine does while it has no work."""
    if isinstance(executable, AheadExecutable):
        return executable.prepare
    if not cache.commit_memory:
        return lambda: False
    spare = memory.available.num_bytes - memory.budget
    return MemoryCommit(executable, spare, available_memory).piece


def engine_memory(
    model: LoadableModel,
    config: EngineConfig,
    backend: Backend,
    available: Available,
    draft: DraftModel | None = None,
    heads: HeadModel | None = None,
) -> MemoryPlan:
    """What an engine of the model takes on the back-end, with a draft model or heads where there are such. Raises
    CapacityError, ConfigError (see `plan_memory`)."""
    program, chosen = model.program, config.speculative
    dtypes = stored_types(program, model.weights)
    drafter: Uses | None = None
    if draft is not None and chosen is not None:
        drafter = draft.uses(program, chosen)
    elif heads is not None:
        drafter = heads.uses(backend)

    def uses(kv: KvCacheSpec, limits: StepLimits) -> MemoryUse:
        return backend.memory_use(program, dtypes, kv, limits if heads is None else heads.target_limits(limits))

    return plan_memory(program, uses, config, available, drafter)
