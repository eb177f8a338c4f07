"""What was asked and what comes back: `Request`, `SamplingParams`, `RequestOutput`. Immutable, array-free."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from kvarn.errors import RequestError

MAX_N = 64
MAX_TOP_K = 2**31 - 1
"""More than any vocabulary has."""
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
SEED_LIMIT = 2**63
MAX_CACHE_SALT_CHARS = 256
MAX_BAD_WORDS = 256
"""Texts; twice as many where all are token sequences, since a text may stand for two."""
MAX_BAD_WORD_CHARS = 128
MAX_BAD_WORD_TOKENS = 1024
MAX_ALLOWED_TOKEN_IDS = 65536


class FinishReason(enum.Enum):
    """Why a sequence ended, with OpenAI's spelling where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


def _check(ok: bool, name: str, value: object, must: str) -> None:
    if not ok:
        raise RequestError(f"{name} must be {must}, not {value!r}", field=name)


class GrammarKind(enum.Enum):
    """What a grammar is written in."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    """Any JSON object; has no text."""
    REGEX = "regex"
    CHOICE = "choice"
    """A JSON list of strings, one of which is the output."""
    LARK = "lark"
    """Lark's notation, in llguidance's dialect."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the whole output must be. Equal ones are compiled once."""

    kind: GrammarKind
    text: str = ""

    @classmethod
    def json_schema(cls, schema: Any) -> Self:
        """Instances of a JSON schema, given as the value that its JSON stands for. Raises RequestError."""
        return cls(GrammarKind.JSON_SCHEMA, _json(schema))

    @classmethod
    def json_object(cls) -> Self:
        """Any JSON object."""
        return cls(GrammarKind.JSON_OBJECT)

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Texts that match the pattern as a whole (the syntax of Rust's regex crate)."""
        return cls(GrammarKind.REGEX, pattern)

    @classmethod
    def choice(cls, options: Sequence[str]) -> Self:
        """One of these texts. Raises RequestError."""
        return cls(GrammarKind.CHOICE, _json(list(options)))

    @classmethod
    def lark(cls, text: str) -> Self:
        """Texts of a context-free grammar."""
        return cls(GrammarKind.LARK, text)


def _json(value: Any) -> str:
    """Keys stay in order: objects have their properties in that of the schema."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the grammar is no JSON value: {error}", field="grammar") from None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Defaults sample from the model's own distribution.

    Order of application: `logit_bias`, the masks (`min_tokens` of stop tokens, `allowed_token_ids`, `bad_words`,
    `grammar`), penalties, `temperature`, `min_p`, `top_k`, `top_p`; then one draw. `temperature == 0` is greedy. Where
    the masks together leave no token the request fails. Reported logprobs are of the model's own distribution
    (log-softmax of the raw logits), before any of these.

    Raises `RequestError` naming the field on construction.
    """

    max_tokens: int | None = None
    """Most tokens to generate; None: up to the model's length limit."""
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    """0 or -1: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output tokens (Keskar et al. 2019, CTRL, section 4.1)."""
    presence_penalty: float = 0.0
    """Over output tokens."""
    frequency_penalty: float = 0.0
    """Over output tokens, per occurrence."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens that may come; the ends of the text are not among them unless they are named. None: all."""
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    """Texts, or sequences of token ids, whose last token may not come where the others are the last of the output. A
    text stands for its tokens as it is, and for those that it has after a space."""
    seed: int | None = None
    """None: the engine picks one per request."""
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """None: off. 0: the chosen token's only. k: also the k most likely tokens'."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens from the second on, which have come with the first output. Such a prompt is
    computed in full, whatever the prefix cache has."""
    num_speculative_tokens: int | None = None
    """Tokens guessed ahead at most; 0: none. None: as many as the engine sees fit. It changes how fast tokens come, not
    their distribution."""
    grammar: Grammar | None = None
    """What the whole output must be; it ends with one of the model's ends of text where it is complete."""

    def __post_init__(self) -> None:
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(self.min_tokens >= 0, "min_tokens", self.min_tokens, "at least 0")
        if self.max_tokens is not None:
            _check(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "at most max_tokens")
        _check(
            math.isfinite(self.temperature) and 0 <= self.temperature <= 100,
            "temperature",
            self.temperature,
            "between 0 and 100",
        )
        _check(-1 <= self.top_k <= MAX_TOP_K, "top_k", self.top_k, f"-1 or 0 (off), or between 1 and {MAX_TOP_K}")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _check(
            0.01 <= self.repetition_penalty <= 100, "repetition_penalty", self.repetition_penalty,
            "between 0.01 and 100",
        )
        _check(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "between -2 and 2")
        _check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "between -2 and 2")
        _check(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            "logit_bias",
            f"{len(self.logit_bias)} entries",
            f"at most {MAX_LOGIT_BIAS} entries",
        )
        for token, bias in self.logit_bias.items():
            _check(token >= 0, "logit_bias", token, "keyed by token ids of at least 0")
            _check(-100 <= bias <= 100, "logit_bias", bias, "between -100 and 100")
        self._check_masks()
        _check(self.seed is None or -SEED_LIMIT <= self.seed < SEED_LIMIT, "seed", self.seed, "a 64-bit integer")
        _check(1 <= self.n <= MAX_N, "n", self.n, f"between 1 and {MAX_N}")
        _check(
            len(self.stop) <= MAX_STOP_STRINGS,
            "stop",
            f"{len(self.stop)} strings",
            f"at most {MAX_STOP_STRINGS} strings",
        )
        for stop in self.stop:
            _check(
                0 < len(stop) <= MAX_STOP_STRING_CHARS,
                "stop",
                stop[:40],
                f"strings of 1 to {MAX_STOP_STRING_CHARS} characters",
            )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _check(count is None or 0 <= count <= MAX_LOGPROBS, name, count, f"between 0 and {MAX_LOGPROBS}")
        drafts = self.num_speculative_tokens
        _check(drafts is None or drafts >= 0, "num_speculative_tokens", drafts, "at least 0")
        if self.grammar is not None:
            # A grammar that is complete leaves only the end of the text.
            _check(self.min_tokens == 0, "min_tokens", self.min_tokens, "0 with a grammar, which says where it ends")
            _check(not self.ignore_eos, "ignore_eos", True, "false with a grammar, which says where it ends")

    def _check_masks(self) -> None:
        allowed, words = self.allowed_token_ids, self.bad_words
        if allowed is not None:
            must = f"1 to {MAX_ALLOWED_TOKEN_IDS} token ids"
            _check(0 < len(allowed) <= MAX_ALLOWED_TOKEN_IDS, "allowed_token_ids", f"{len(allowed)} of them", must)
        most = MAX_BAD_WORDS if any(isinstance(word, str) for word in words) else 2 * MAX_BAD_WORDS
        _check(len(words) <= most, "bad_words", f"{len(words)} of them", f"at most {most}")
        for word in words:
            longest = MAX_BAD_WORD_CHARS if isinstance(word, str) else MAX_BAD_WORD_TOKENS
            must = f"texts of 1 to {MAX_BAD_WORD_CHARS} characters or 1 to {MAX_BAD_WORD_TOKENS} token ids"
            _check(0 < len(word) <= longest, "bad_words", word[:40], must)

    @property
    def greedy(self) -> bool:
        """True where the most likely token is taken (after bias and penalties)."""
        return self.temperature == 0.0


class Pooling(enum.Enum):
    """How the hidden states of a prompt's tokens, after the model's last norm, become one vector."""

    MEAN = "mean"
    """Their mean. All of them are computed: nothing is taken from the prefix cache."""
    LAST = "last"
    """That of the last token."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked. Immutable; the running state lives in the scheduler's `Sequence`s (`sampling.n` of them)."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    priority: int = 0
    tenant: str = ""
    """Whose request it is: what fairness is between. Never in a log."""
    cache_salt: str = ""
    """With `tenant`, which cached prefixes it may use: only those computed under the same two."""
    ttft_slo_ms: float | None = None
    """Refuse it at once where its first token is not to be expected within this time. None: what the engine's config
    says."""
    pooling: Pooling | None = None
    """Makes it an embedding: `RequestOutput.embedding` is what was asked for. It goes the way of all requests, as one
    for a single token, which means nothing."""

    def __post_init__(self) -> None:
        single = self.sampling.max_tokens == 1 and self.sampling.n == 1
        _check(self.pooling is None or single, "pooling", self.pooling, "None unless max_tokens and n are 1")
        slo = self.ttft_slo_ms
        _check(slo is None or 0 < slo < math.inf, "ttft_slo_ms", slo, "above 0")
        must = f"at most {MAX_CACHE_SALT_CHARS} characters"
        _check(len(self.cache_salt) <= MAX_CACHE_SALT_CHARS, "cache_salt", f"{len(self.cache_salt)} characters", must)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token's log-probability and the `top` alternatives as (token id, logprob), best first."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What one sequence gained since the last `RequestOutput` (deltas, never repeated)."""

    index: int
    """0 … n-1."""
    token_ids: tuple[int, ...]
    text: str
    """Whole code points only; held back while it may be the start of a stop string."""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it."""


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """When things happened to a request, in seconds of the engine's clock (`time.perf_counter`)."""

    arrived: float
    """It was handed to the engine."""
    started: float | None
    """The first step with a part of it began; None where there was none."""
    first_token: float | None
    """The step of its first token was computed."""
    ended: float

    @property
    def seconds(self) -> float:
        """From arrival to end."""
        return self.ended - self.arrived

    @property
    def queue_seconds(self) -> float | None:
        """From arrival to the first step. None, here and below, where it did not come so far."""
        return None if self.started is None else self.started - self.arrived

    @property
    def prefill_seconds(self) -> float | None:
        """From the first step to the first token."""
        return None if self.started is None or self.first_token is None else self.first_token - self.started

    @property
    def decode_seconds(self) -> float | None:
        """From the first token to the end."""
        return None if self.first_token is None else self.ended - self.first_token

    @property
    def inference_seconds(self) -> float | None:
        """From the first step to the end: prefill and decode."""
        return None if self.started is None else self.ended - self.started


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One message of a request's stream. `finished` is true on the last one only."""

    request_id: str
    outputs: tuple[SequenceOutput, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    finished: bool
    num_draft_tokens: int = 0
    """Tokens that were guessed ahead and verified, of all its sequences; on the last output only."""
    num_accepted_tokens: int = 0
    """Those of them that are part of the output."""
    times: RequestTimes | None = None
    """On the last output only; None there, too, where it never came to the engine."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens from the second on, where they were asked for; on the first output only."""
    embedding: tuple[float, ...] | None = None
    """What `Request.pooling` asks for, with the precision of float32 and the length it came out with."""
