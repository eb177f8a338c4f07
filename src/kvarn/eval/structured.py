"""What structured output is worth: how many JSON schemas are taken, and whether all that comes out is valid.

Each schema is compiled as the server compiles it. A model then answers under each one that was accepted, at temperature
1, and the `jsonschema` package says whether the answer is an instance. The model's weights do not matter, and are
random: what it says goes through every branch of a grammar, which a good model would not.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from kvarn.config import CacheConfig, EngineConfig, GrammarConfig, SchedulerConfig, SpeculativeConfig
from kvarn.engine import EngineCore, build_engine
from kvarn.engine.events import RequestFailed
from kvarn.errors import ConfigError, KvarnError, RequestError
from kvarn.eval.random_model import byte_tokenizer, random_model
from kvarn.request import FinishReason, Grammar, Request, SamplingParams
from kvarn.text import Tokenizer

CLOSERS = {'"': 1.0, "}": 0.6, "]": 0.6, ",": 0.3}
"""Texts that bring an answer nearer to its end, with how much: a model of random weights would go on for thousands of
tokens in each string."""
QUOTE = {'"': 1.0}
"""For strings that must have some other character before they may end, as an @."""
TRIES = ((CLOSERS, 8.0, 768), (CLOSERS, 40.0, 2048), (QUOTE, 40.0, 2048))
"""What each try is pushed to say, how hard, and the tokens it may take."""
BATCH = 32


class Status(Enum):
    """What became of a schema."""

    VALID = "valid"
    INVALID = "invalid"
    """An answer came that is no instance. There must be none."""
    REFUSED = "refused"
    """When it was compiled."""
    GAVE_UP = "gave up"
    """Refused on the way: a limit was reached that no trial foresaw."""
    UNFINISHED = "unfinished"
    """No answer came to its end in the tokens it had."""
    UNCHECKED = "unchecked"
    """`jsonschema` can do nothing with the schema."""


@dataclass(slots=True)
class Outcome:
    """Of one schema. detail: why, where it is neither valid nor unfinished."""

    name: str
    status: Status
    detail: str = ""
    compile_seconds: float = 0.0
    answer: str = ""


@dataclass(frozen=True, slots=True)
class StructuredResult:
    """Of a set of schemas."""

    outcomes: Sequence[Outcome]

    def count(self, status: Status) -> int:
        """Schemas with that status."""
        return sum(outcome.status is status for outcome in self.outcomes)

    @property
    def coverage(self) -> float:
        """Share of the schemas that were accepted."""
        return 1 - (self.count(Status.REFUSED) + self.count(Status.GAVE_UP)) / max(1, len(self.outcomes))

    def compile_ms(self, share: float) -> float:
        """Milliseconds within which that share of the schemas was compiled or refused."""
        times = sorted(outcome.compile_seconds for outcome in self.outcomes)
        return 1000 * times[min(len(times) - 1, int(share * len(times)))] if times else 0.0

    def reasons(self) -> list[tuple[str, int]]:
        """Why schemas were refused, and how many for each reason, the most first. Figures and texts of a schema's own
        are left out."""
        refused = (o.detail for o in self.outcomes if o.status in (Status.REFUSED, Status.GAVE_UP))
        return Counter(_general(detail) for detail in refused).most_common()


def _general(detail: str) -> str:
    detail = detail.removeprefix("the grammar ").removeprefix("cannot be used: ")
    if "Unimplemented keys" not in detail and "Unknown format" not in detail:
        detail = re.sub(r"\"[^\"]*\"|/.*/|'[^']*'|#\S+", "…", detail)
        detail = re.sub(r"\d+", "N", detail)
    return detail[:110]


def read_schemas(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, schema) of a .json file (a schema), a .jsonl file (one a line, also as {"case": {"schema": …}} and
    {"json_schema": …}, with its "file", "name" or "unique_id"), or a folder of such files. Raises ConfigError."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".json", ".jsonl"))
        if not files:
            raise ConfigError(f"{path}: no .json or .jsonl file in it")
        for file in files:
            yield from read_schemas(file)
        return
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip():
                    yield _named(json.loads(line), f"{path.name}:{number}")
        else:
            yield _named(json.loads(text), path.name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _named(value: Any, name: str) -> tuple[str, Any]:
    """The schema in a record of one of the known forms; a value of no such form is the schema itself."""
    if not isinstance(value, dict):
        return name, value
    named = next((value[key] for key in ("file", "name", "unique_id") if isinstance(value.get(key), str)), name)
    case = value.get("case")
    if isinstance(case, dict) and "schema" in case:
        return named, case["schema"]
    schema = value.get("json_schema")
    if schema is None:
        return name, value
    return named, json.loads(schema) if isinstance(schema, str) else schema


def evaluate_structured(
    schemas: Iterable[tuple[str, Any]],
    *,
    tokenizer: Tokenizer | None = None,
    grammar: GrammarConfig | None = None,
    speculative: SpeculativeConfig | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> StructuredResult:
    """Tries every schema. tokenizer: whose vocabulary is used; None: one of bytes. progress: told (done, all)."""
    core = _engine(tokenizer or byte_tokenizer(), grammar or GrammarConfig(), speculative, seed)
    pairs = list(schemas)
    outcomes = [Outcome(name, Status.UNFINISHED) for name, _ in pairs]
    try:
        core.grammars.compile(Grammar.regex("a"))  # what the first grammar waits for is no schema's fault
        grammars: dict[int, Grammar] = {}
        for index, (_, schema) in enumerate(pairs):
            compiled = _compile(core, schema, outcomes[index])
            if compiled is not None:
                grammars[index] = compiled
            progress(index + 1, 2 * len(pairs))
        for closers, push, tokens in TRIES:
            left = {i: g for i, g in grammars.items() if outcomes[i].status is Status.UNFINISHED}
            for done, (index, event) in enumerate(_answers(core, left, _bias(core, closers, push), tokens, seed)):
                _judge(outcomes[index], pairs[index][1], event)
                progress(len(pairs) + min(done + 1, len(pairs)), 2 * len(pairs))
    finally:
        core.close()
    return StructuredResult(outcomes)


def _engine(
    tokenizer: Tokenizer, grammar: GrammarConfig, speculative: SpeculativeConfig | None, seed: int
) -> EngineCore:
    length = max(tokens for _, _, tokens in TRIES) + 16
    model = random_model(tokenizer.vocab_size, length, tokenizer.eos_token_ids, seed)
    config = EngineConfig(
        threads=1,
        cache=CacheConfig(num_blocks=BATCH * length // 16, enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=BATCH, max_num_queued_requests=1 << 30),
        grammar=grammar,
        speculative=speculative,
        packed_cache_bytes=0,
    )
    return build_engine(model, tokenizer, config, name="random").core


def _compile(core: EngineCore, schema: Any, outcome: Outcome) -> Grammar | None:
    started = time.perf_counter()
    try:
        grammar = Grammar.json_schema(schema)
        core.grammars.check(grammar)
        core.grammars.compile(grammar)
    except RequestError as error:
        outcome.status, outcome.detail = Status.REFUSED, str(error)
        return None
    finally:
        outcome.compile_seconds = time.perf_counter() - started
    return grammar


def _answers(
    core: EngineCore, grammars: Mapping[int, Grammar], bias: Mapping[int, float], max_tokens: int, seed: int
) -> Iterator[tuple[int, tuple[str, FinishReason] | KvarnError]]:
    """For each grammar the text that a sequence came to and why it ended, or how it failed, in the order of ends."""
    waiting, texts = iter(grammars.items()), dict[int, str]()
    while True:
        for index, grammar in waiting:
            sampling = SamplingParams(max_tokens=max_tokens, seed=seed + index, logit_bias=bias, grammar=grammar)
            core.add(Request(str(index), (0,), sampling))
            texts[index] = ""
            if len(texts) == BATCH:
                break
        if not texts:
            return
        for event in core.step():
            index = int(event.request_id)
            if isinstance(event, RequestFailed):
                del texts[index]
                yield index, event.error
                continue
            (part,) = event.outputs
            texts[index] += part.text
            if part.finish_reason is not None:
                yield index, (texts.pop(index), part.finish_reason)


def _bias(core: EngineCore, closers: Mapping[str, float], push: float) -> dict[int, float]:
    tokenizer = core.tokenizer
    bias = {tokenizer.encode(text)[0]: push * much for text, much in closers.items()}
    return bias | dict.fromkeys(tokenizer.eos_token_ids, 1.5 * push)


def _judge(outcome: Outcome, schema: Any, event: tuple[str, FinishReason] | KvarnError) -> None:
    if isinstance(event, KvarnError):
        outcome.status, outcome.detail = Status.GAVE_UP, str(event)
        return
    outcome.answer, reason = event
    if reason is FinishReason.STOP:
        outcome.status, outcome.detail = _validated(schema, outcome.answer)


def _validated(schema: Any, answer: str) -> tuple[Status, str]:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for

    try:
        value = json.loads(answer)
    except ValueError as error:
        return Status.INVALID, f"no JSON: {error}"
    try:
        kind = validator_for(schema, default=Draft202012Validator)
        wrong = next(kind(schema, format_checker=kind.FORMAT_CHECKER).iter_errors(value), None)
    except Exception as error:  # a schema may be wrong in any way
        return Status.UNCHECKED, f"{type(error).__name__}: {error}"[:200]
    return (Status.VALID, "") if wrong is None else (Status.INVALID, wrong.message[:300])
