"""Engines over tiny random models whose tokens are bytes, and the way to watch what they do."""

import functools
import time

import numpy as np

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.cache import BlockPool, NullPrefixCache, RadixPrefixCache
from kvarn.config import CacheConfig, CudaConfig, EngineConfig, SchedulerConfig
from kvarn.engine import EngineCore, LoadedEngine, build_engine, make_backend
from kvarn.engine.draft import DraftModel
from kvarn.kv_types import KV_TYPES
from kvarn.models.in_memory import InMemoryModel
from kvarn.request import Request, RequestOutput, SamplingParams
from kvarn.runner import HiddenStatePooler, Runner
from kvarn.sampling import NativeSampler
from kvarn.scheduler import MeasuredCost, make_scheduler
from kvarn.spec import make_drafter
from kvarn.step import SampledToken
from kvarn.tensors import DType, Tensor
from kvarn.tensors.dequantize import dequantize
from kvarn.testing import byte_tokenizer, tiny_model
from kvarn.text import spellings

EOS = 257


@functools.cache
def shared_model(family, seed, stored=DType.F32):
    return tiny_model(family, seed=seed, dtype=stored)


@functools.cache
def nearly(family, seed, noise):
    """A model that mostly says what `shared_model` does: all weights are off by about that share of their size."""
    model, rng = shared_model(family, seed), np.random.default_rng(7)
    tensors = {}
    for name, tensor in model.tensors.items():
        values = dequantize(tensor)
        off = noise * values.std() * rng.standard_normal(values.shape)
        tensors[name] = Tensor.from_array((values + off).astype(np.float32))
    return InMemoryModel(model.config, model.program, tensors)


def tiny_engine(
    *,
    family="llama",
    seed=0,
    backend="reference",
    max_model_len=None,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_num_queued_requests=64,
    num_blocks=64,
    block_size=16,
    dtype="float32",
    threads=1,
    scheduling=None,
    identity="",
    on_plan=lambda plan: None,
    observer=None,
    speculative=None,
    model=None,
    draft=None,
    cuda=None,
    **cache,
):
    """model: instead of one of `family` and `seed`. draft: what guesses, with method draft. cache: more of
    `CacheConfig`; scheduling: of `SchedulerConfig`; identity and what follows: of `build_engine`."""
    config = EngineConfig(
        max_model_len=max_model_len,
        backend=backend,
        threads=threads,
        cache=CacheConfig(block_size=block_size, num_blocks=num_blocks, dtype=dtype, **cache),
        scheduler=SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_num_queued_requests, **(scheduling or {})),
        speculative=speculative,
        cuda=cuda or CudaConfig(),
    )
    model = model or shared_model(family, seed)
    if draft is not None:
        draft = DraftModel(
            draft, spellings(byte_tokenizer().vocabulary), make_backend(backend, threads), "tinier",
            vocab=speculative.draft_vocab,
        )  # fmt: skip
    return build_engine(
        model, byte_tokenizer(), config, name="tiny", identity=identity, draft=draft, on_plan=on_plan, observer=observer
    )


def run_core(core: EngineCore, requests: list[Request]) -> dict[str, list[RequestOutput]]:
    """Adds all requests and steps until none is left."""
    outputs: dict[str, list[RequestOutput]] = {}
    for request in requests:
        core.add(request)
    for _ in range(100_000):
        if not core.has_work():
            return outputs
        for event in core.step():
            assert isinstance(event, RequestOutput), event
            outputs.setdefault(event.request_id, []).append(event)
    raise AssertionError("the work does not end")


def tokens_of(outputs: list[RequestOutput], index: int = 0) -> list[int]:
    return [token for o in outputs for part in o.outputs if part.index == index for token in part.token_ids]


def text_of(outputs: list[RequestOutput], index: int = 0) -> str:
    return "".join(part.text for o in outputs for part in o.outputs if part.index == index)


def request(name: str, prompt: str | tuple[int, ...], **sampling) -> Request:
    ids = tuple(prompt.encode()) if isinstance(prompt, str) else prompt
    return Request(name, ids, SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 8, **sampling}))


def handmade_engine(
    *,
    family="llama",
    stored=DType.F32,
    backend="cpu",
    wrap_executable=lambda e: e,
    wrap_sampler=lambda s: s,
    max_model_len=512,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_num_queued_requests=64,
    num_blocks=64,
    block_size=16,
    dtype="float16",
    threads=1,
    tokenizer=None,
    prefix_caching=True,
    cost=None,
    observer=None,
    clock=time.perf_counter,
    speculative=None,
    wrap_drafter=lambda d: d,
    model=None,
    restart_delays=(0.0, 0.01),
    idle=lambda: False,
    embeddings=False,
    ahead=lambda executable, vocab_size: None,
    **scheduling,
) -> LoadedEngine:
    """An engine put together part by part, so that a test can get between them. scheduling: of `SchedulerConfig`.

    ahead: makes what begins steps on the wrapped executable; None: nothing does. model: instead of a tiny one of
    `family` and `stored`.
    """
    model = model or shared_model(family, 0, stored)
    config = EngineConfig(
        max_model_len=max_model_len,
        backend=backend,
        cache=CacheConfig(block_size=block_size, num_blocks=num_blocks, dtype=dtype),
        scheduler=SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_num_queued_requests, **scheduling),
        speculative=speculative,
        restart_delays=restart_delays,
    )
    cost = cost or MeasuredCost()
    outputs = (model.program.last_layer,) if embeddings else ()
    limits = StepLimits(max_num_batched_tokens, max_num_seqs, max_model_len, config.max_step_drafts, outputs)
    executable = make_backend(backend, threads).load(
        model.program, model.weights, KvCacheSpec(num_blocks, block_size, dtype), limits
    )
    sampler = wrap_sampler(NativeSampler(model.program.vocab_size))
    drafter = wrap_drafter(make_drafter(speculative))
    pooler = HiddenStatePooler(model.program, model.weights) if embeddings else None
    wrapped = wrap_executable(executable)
    begins = ahead(wrapped, model.program.vocab_size)
    runner = Runner(wrapped, sampler, limits, block_size, drafter=drafter, pooler=pooler, ahead=begins)

    def new_scheduler():
        pool = BlockPool(num_blocks, block_size, model.program.kv_groups.windows)
        prefixes = RadixPrefixCache(pool) if prefix_caching else NullPrefixCache()
        return make_scheduler(
            config.scheduler, pool, max_model_len, cost, eos_token_ids=(EOS,), prefix_cache=prefixes, observer=observer,
            speculative=speculative, reference_every=KV_TYPES[dtype].reference_every,
        )  # fmt: skip

    tokenizer = tokenizer or byte_tokenizer()
    vocab_size = model.program.vocab_size
    core = EngineCore(
        runner, new_scheduler, tokenizer, vocab_size, cost=cost, observer=observer, clock=clock, idle=idle
    )
    return LoadedEngine(core, "handmade", tokenizer, model.config, max_model_len, config)


class Wrapper:
    """Passes everything on to what it wraps."""

    def __init__(self, inner) -> None:
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Script(Wrapper):
    """A sampler that says what it was told to: one list of tokens for each stream, whatever the logits are."""

    def __init__(self, inner, *texts: str | list[int]) -> None:
        super().__init__(inner)
        self.tokens = [list(text.encode()) if isinstance(text, str) else text for text in texts]
        self.prompts: dict[int, tuple[int, int]] = {}

    def add(self, sequence) -> None:
        self.inner.add(sequence)
        self.prompts[sequence.sequence_id] = len(sequence.prompt_token_ids), sequence.stream

    def sample(self, logits, sequence_ids, positions):
        sampled = []
        for drawn, position in zip(self.inner.sample(logits, sequence_ids, positions), positions, strict=True):
            prompt, stream = self.prompts[drawn.sequence_id]
            token = self.tokens[stream % len(self.tokens)][position - prompt]
            sampled.append(SampledToken(drawn.sequence_id, token, drawn.logprob))
        return sampled

    def verify(self, logits, sequence_ids, positions, drafts, masks=None):
        tokens, row = [], 0
        for sequence_id, position, draft in zip(sequence_ids, positions, drafts, strict=True):
            for place, guess in enumerate((*draft.token_ids, None)):
                tokens += self.sample(logits[row + place : row + place + 1], [sequence_id], [position + place])
                if tokens[-1].token_id != guess:
                    break
            row += 1 + len(draft.token_ids)
        return tokens


class RecordingSampler(Wrapper):
    """Keeps the logits of every sampled token by (stream, prompt, position)."""

    def __init__(self, inner) -> None:
        super().__init__(inner)
        self.names: dict[int, tuple] = {}
        self.logits: dict[tuple, bytes] = {}

    def add(self, sequence) -> None:
        self.inner.add(sequence)
        self.names[sequence.sequence_id] = (sequence.stream, sequence.prompt_token_ids)

    def sample(self, logits, sequence_ids, positions):
        for row, sequence_id, position in zip(logits, sequence_ids, positions, strict=True):
            self.logits[(*self.names[sequence_id], position)] = row.tobytes()
        return self.inner.sample(logits, sequence_ids, positions)
