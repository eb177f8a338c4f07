"""Settings of an engine, in small frozen records with defaults. Each checks itself and names the field and limit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kvarn.errors import ConfigError
from kvarn.kv_types import CACHE_TYPES, CARD_CACHE_TYPES

LOOKED_UP_FIRST = "ngram+"
"""Before a method: it is asked where nothing is found in prompt and output."""
HEAD_METHODS = ("medusa", "eagle")
"""Ways to guess tokens ahead that need trained heads."""
DRAFT_METHODS = (
    "ngram", "draft", "lookahead", *HEAD_METHODS, *(LOOKED_UP_FIRST + other for other in ("draft", *HEAD_METHODS)),
)  # fmt: skip
"""Ways to guess tokens ahead; `kvarn.spec` says what each is."""
MAX_SPECULATIVE_TOKENS = 128
"""Guesses for one sequence in a step."""
RESTART_DELAYS = (0.0, 0.1, 0.3, 1.0, 2.0)
POLICIES = ("fcfs", "priority", "fair")
"""Orders in which requests are served; `kvarn.scheduler` says what each is."""
BACKENDS = ("cpu", "cuda", "reference")
COMPUTE_TYPES = ("bfloat16", "float16", "float32")
"""Types that a GPU may compute activations in."""
WEIGHT_FORMS = ("stored", "dense", "int8", "int4", "fp8")
"""Forms of matrices on a GPU; `CudaConfig` says what each is."""


def _check(ok: bool, name: str, value: object, must: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {must}, not {value!r}")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The KV cache. kv_cache_bytes None: sized by the planner from memory_utilization and what max_model_len needs."""

    block_size: int = 16
    """Tokens in a block; a multiple of 16."""
    dtype: str = "float16"
    """Stored type of keys and values: one of `CACHE_TYPES`, or of `CARD_CACHE_TYPES` on a GPU. int8 halves
    float16's cache and loses a little, int4 takes a third of it and loses more: `kvarn eval kv-cache` measures how
    much."""
    kv_cache_bytes: int | None = None
    num_blocks: int | None = None
    """Exact number of blocks; overrides kv_cache_bytes (tests, benchmarks)."""
    memory_utilization: float = 0.8
    """Share of the memory available to the process that weights, cache and activations may take together."""
    commit_memory: bool = False
    """Whether the system is made to back the whole cache soon after the start, while nothing else is to be done, and
    not when its blocks are first used. As long as the share that memory_utilization leaves to others is there."""
    enable_prefix_caching: bool = True
    """Whether what was computed for one request is kept for the next that begins with the same tokens."""
    shared_prefixes: tuple[tuple[int, ...], ...] = ()
    """Token ids that requests of any tenant and salt may share, such as a system prompt; never evicted. Whole blocks of
    them: the rest is kept for each salt by itself."""
    shared_system_prompts: tuple[str, ...] = ()
    """The same as texts: conversations that begin with one of these as their system message share it."""
    kv_offload_bytes: int = 0
    """Of a file for blocks that were evicted, where loading them is faster than computing; 0: none."""
    kv_offload_dir: str | None = None
    """The file's folder, for one process at a time; later ones find what is in it. None: beside the pulled models."""

    def __post_init__(self) -> None:
        _check(self.block_size >= 16 and self.block_size % 16 == 0, "block_size", self.block_size, "a multiple of 16")
        shared = self.enable_prefix_caching or not (self.shared_prefixes or self.shared_system_prompts)
        _check(shared, "enable_prefix_caching", False, "true where there are shared prefixes")
        _check(self.kv_offload_bytes >= 0, "kv_offload_bytes", self.kv_offload_bytes, "at least 0")
        offload = self.enable_prefix_caching or not self.kv_offload_bytes
        _check(offload, "enable_prefix_caching", False, "true where there is kv_offload_bytes")
        _check(self.kv_cache_bytes is None or self.kv_cache_bytes > 0, "kv_cache_bytes", self.kv_cache_bytes, "above 0")
        _check(self.num_blocks is None or self.num_blocks > 0, "num_blocks", self.num_blocks, "above 0")
        _check(0 < self.memory_utilization <= 1, "memory_utilization", self.memory_utilization, "above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The token-budget loop."""

    max_num_seqs: int = 64
    """Sequences in one step at most."""
    max_num_batched_tokens: int = 512
    """Tokens in one step at most (the budget that prefill chunks and decodes share)."""
    max_num_queued_requests: int = 1024
    """Requests waiting at most; one more is refused."""
    max_num_queued_tokens: int | None = None
    """Prompt tokens of the waiting requests at most; one that exceeds it is refused, unless nothing waits."""
    policy: str = "fcfs"
    """Who is served first: one of `POLICIES`."""
    itl_target_ms: float | None = None
    """Prompts are computed in chunks so small that running streams get a token within this time, as far as can be."""
    ttft_slo_ms: float | None = None
    """Requests whose first token is not to be expected within this time are refused, unless they say otherwise."""

    def __post_init__(self) -> None:
        _check(self.max_num_seqs >= 1, "max_num_seqs", self.max_num_seqs, "at least 1")
        _check(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            self.max_num_batched_tokens,
            f"at least max_num_seqs ({self.max_num_seqs})",
        )
        _check(self.max_num_queued_requests >= 1, "max_num_queued_requests", self.max_num_queued_requests, "at least 1")
        _check(self.policy in POLICIES, "policy", self.policy, f"one of {', '.join(POLICIES)}")
        for name in ("max_num_queued_tokens", "itl_target_ms", "ttft_slo_ms"):
            value = getattr(self, name)
            _check(value is None or 0 < value < math.inf, name, value, "above 0")


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """Speculative decoding: tokens are guessed ahead, and those that are right come in one step."""

    method: str = "ngram"
    """One of `DRAFT_METHODS`. ngram: what followed when the last tokens occurred before, in prompt or output. draft:
    what a smaller model says. lookahead: n-grams that the model makes up itself, in rows beside its text. medusa: what
    heads guess that were trained for the model. eagle: what a trained layer guesses, going on from its own guesses.
    ngram+draft, ngram+medusa, ngram+eagle: as ngram, and where it finds nothing as the other."""
    k: int | None = None
    """Tokens guessed ahead for each sequence; None: chosen in each step by what was right lately and what it costs. Of
    lookahead the rows, those of its window too."""
    max_k: int = 8
    """Most of them where k is None, and of those that are looked up first, whatever k is. Not of lookahead, whose
    settings say how many there are."""
    ngram_min: int = 2
    """Tokens that must have occurred together before, at least."""
    ngram_max: int = 8
    """Tokens beyond which a longer match is no better."""
    corpus_tokens: int = 0
    """Output tokens remembered of ended sequences of the same tenant and cache_salt, for matches; 0: none."""
    max_step_drafts: int = 64
    """Guessed tokens in one step at most, of all sequences; logits of so many more rows are allocated."""
    p_min: float = 0.0
    """Of draft and eagle with k given: greedy guessing goes on for as long as all that was guessed is right with this
    probability, as the drafter holds it. Where k is None it is chosen, too."""
    heads: str = ""
    """The file of trained heads (`kvarn spec train`)."""
    model: str = ""
    """Of draft: a model with the same vocabulary, a name or a path."""
    draft_vocab: int = 0
    """Of draft: the model says only the first so many tokens of its vocabulary, the commonest of most, which takes less
    to compute; 0: all."""
    window: int = 2
    """Of lookahead: n-grams that are being made at a time."""
    ngram: int = 3
    """Of lookahead: tokens of an n-gram, the one that it is found by among them."""
    guesses: int = 2
    """Of lookahead: n-grams that are verified at a time."""

    def __post_init__(self) -> None:
        most = MAX_SPECULATIVE_TOKENS
        _check(self.method in DRAFT_METHODS, "speculative method", self.method, f"one of {', '.join(DRAFT_METHODS)}")
        needs = self.source in HEAD_METHODS
        must = f"the file of heads that method={self.method} needs" if needs else f"left out for method={self.method}"
        _check(needs == bool(self.heads), "speculative heads", self.heads, must)
        _check(self.k is None or 1 <= self.k <= most, "speculative k", self.k, f"auto, or between 1 and {most}")
        _check(1 <= self.max_k <= most, "speculative max_k", self.max_k, f"between 1 and {most}")
        _check(1 <= self.ngram_min <= 64, "speculative ngram_min", self.ngram_min, "between 1 and 64")
        must = f"between ngram_min ({self.ngram_min}) and 64"
        _check(self.ngram_min <= self.ngram_max <= 64, "speculative ngram_max", self.ngram_max, must)
        must = "between 0 and 16777216"
        _check(0 <= self.corpus_tokens <= 1 << 24, "speculative corpus_tokens", self.corpus_tokens, must)
        draft = self.source == "draft"
        named = bool(self.model) == draft
        must = "the name or path of a model with method=draft or ngram+draft, absent otherwise"
        _check(named, "speculative model", self.model, must)
        must = "at least 0, and 0 without a draft model"
        good = self.draft_vocab == 0 or (self.draft_vocab > 0 and draft)
        _check(good, "speculative draft_vocab", self.draft_vocab, must)
        must = "between 1 and 4096"
        _check(1 <= self.max_step_drafts <= 4096, "speculative max_step_drafts", self.max_step_drafts, must)
        must = "between 0 and 1, and 0 with k=auto or other guesses than those of draft and eagle"
        good = self.p_min == 0 or (0 < self.p_min <= 1 and self.k is not None and self.source in ("draft", "eagle"))
        _check(good, "speculative p_min", self.p_min, must)
        _check(1 <= self.window <= 64, "speculative window", self.window, "between 1 and 64")
        _check(2 <= self.ngram <= 16, "speculative ngram", self.ngram, "between 2 and 16")
        _check(1 <= self.guesses <= 64, "speculative guesses", self.guesses, "between 1 and 64")
        rows, most = self.lookahead_rows, min(most, self.max_step_drafts)
        _check(self.method != "lookahead" or rows <= most, "speculative (window + guesses) * (ngram - 1)", rows,
               f"at most {most} (max_step_drafts)")  # fmt: skip

    @property
    def looks_up_first(self) -> bool:
        """Whether there are two sources of guesses, of which one copies and costs nothing."""
        return self.method.startswith(LOOKED_UP_FIRST)

    @property
    def source(self) -> str:
        """The method without what is looked up first."""
        return self.method.removeprefix(LOOKED_UP_FIRST)

    @property
    def writes_ahead(self) -> bool:
        """Whether the drafter writes KV of its own for tokens that it guesses, in blocks of the sequence."""
        return self.source == "draft"

    @property
    def costly(self) -> bool:
        """Whether making guesses takes a part of a step worth counting."""
        return self.source == "draft" or self.source in HEAD_METHODS

    @property
    def most_copies(self) -> int:
        """Guesses for a sequence that are looked up first, at most."""
        return self.max_k if self.looks_up_first else 0

    @property
    def most(self) -> int:
        """Guesses for a sequence at most."""
        if self.method == "lookahead":
            return self.lookahead_rows if self.k is None else min(self.k, self.lookahead_rows)
        return self.max_k if self.k is None else self.k

    @property
    def window_rows(self) -> int:
        """Rows of lookahead's window."""
        return self.window * (self.ngram - 1)

    @property
    def lookahead_rows(self) -> int:
        """Those, and of the n-grams that it verifies."""
        return (self.window + self.guesses) * (self.ngram - 1)


@dataclass(frozen=True, slots=True)
class GrammarConfig:
    """Bounds of what is done for a request's grammar (`SamplingParams.grammar`)."""

    max_grammar_bytes: int = 256 << 10
    """Of its text, in UTF-8."""
    max_grammar_depth: int = 64
    """Lists and objects of a JSON schema within one another."""
    max_grammar_seconds: float = 5.0
    """To compile it, in a process that is ended then."""
    max_grammar_mb: int = 1024
    """Mebibytes of memory to compile it, in that process."""
    max_mask_ms: float = 250.0
    """For the tokens that are allowed at one place, when it is tried."""
    max_queued_grammars: int = 64
    """Waiting to be compiled; one more is refused."""
    grammar_cache_entries: int = 64
    """Compiled grammars that are kept for the next request with the same."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            _check(0 < value < math.inf, name, value, "above 0")
        _check(self.max_grammar_depth <= 512, "max_grammar_depth", self.max_grammar_depth, "at most 512")


@dataclass(frozen=True, slots=True)
class CudaConfig:
    """Of the back-end for NVIDIA GPUs alone."""

    dtype: str = "bfloat16"
    """What activations are computed in: one of `COMPUTE_TYPES`."""
    weights: str = "stored"
    """stored: matrices that the file has quantized stay so, without loss; others are of the dtype. dense: all are of
    the dtype. int8, fp8 (E4M3): a byte for an element, a scale for a row. int4: four bits, a scale and an offset for
    weight_group elements. Tables of embeddings are of the dtype in all of these."""
    weight_group: int = 32
    """Of int4: 32, 64 or 128."""
    device: str = "cuda"
    """cuda: the first card that CUDA_VISIBLE_DEVICES lists; cpu: Triton's interpreter, for tests."""

    def __post_init__(self) -> None:
        _check(self.dtype in COMPUTE_TYPES, "dtype", self.dtype, f"one of {', '.join(COMPUTE_TYPES)}")
        _check(self.weights in WEIGHT_FORMS, "weights", self.weights, f"one of {', '.join(WEIGHT_FORMS)}")
        _check(self.weight_group in (32, 64, 128), "weight_group", self.weight_group, "32, 64 or 128")
        _check(self.device in ("cuda", "cpu"), "device", self.device, "cuda or cpu")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine needs beside the model. threads 0: one for each physical core the process may use."""

    max_model_len: int | None = None
    """Longest prompt + output; None: what the model was trained for, or what fits."""
    backend: str = "cpu"
    """One of `BACKENDS`."""
    threads: int = 0
    cuda: CudaConfig = field(default_factory=CudaConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculative: SpeculativeConfig | None = None
    """None: no token is guessed."""
    grammar: GrammarConfig = field(default_factory=GrammarConfig)
    packed_cache_bytes: int | None = None
    """Disk space for packed weights, which later starts map; 0: none. None: KVARN_PACKED_CACHE_BYTES, or 20 GB."""
    restart_delays: tuple[float, ...] = RESTART_DELAYS
    """Seconds to wait before each try to start the engine anew after a step has failed. As many tries as there are."""

    def __post_init__(self) -> None:
        _check(self.packed_cache_bytes is None or self.packed_cache_bytes >= 0, "packed_cache_bytes",
               self.packed_cache_bytes, "at least 0")  # fmt: skip
        _check(self.max_model_len is None or self.max_model_len >= 1, "max_model_len", self.max_model_len, "at least 1")
        _check(self.backend in BACKENDS, "backend", self.backend, f"one of {', '.join(BACKENDS)}")
        kinds = CARD_CACHE_TYPES if self.backend == "cuda" else CACHE_TYPES
        must = f"one of {', '.join(kinds)} on {'a GPU' if self.backend == 'cuda' else 'a CPU'}"
        _check(self.cache.dtype in kinds, "kv_cache_dtype", self.cache.dtype, must)
        _check(0 <= self.threads <= 1024, "threads", self.threads, "between 0 and 1024")
        waits = all(0 <= delay < math.inf for delay in self.restart_delays)
        _check(waits, "restart_delays", self.restart_delays, "seconds of at least 0")

    @property
    def max_step_drafts(self) -> int:
        """Tokens guessed ahead in one step at most."""
        return 0 if self.speculative is None else self.speculative.max_step_drafts
