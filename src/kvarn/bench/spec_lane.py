"""An engine that answers prompts with one way to guess ahead, and counts what that takes and brings."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self

from kvarn.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from kvarn.draft_tree import levels
from kvarn.engine import EngineCore, load_engine
from kvarn.engine.events import RequestFailed
from kvarn.request import Request, SamplingParams
from kvarn.scheduler import NullObserver, StepTimes
from kvarn.scheduler import Sequence as Running
from kvarn.step import SchedulerOutput

BATCHED_TOKENS = SchedulerConfig().max_num_batched_tokens


@dataclass(frozen=True, slots=True)
class Method:
    """A way to guess ahead under the name that the table has; None: no guesses."""

    name: str
    config: SpeculativeConfig | None


@dataclass(frozen=True, slots=True)
class Setup:
    """What is the same for every method."""

    path: Path
    threads: int
    batch: int
    max_tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Tally:
    """What some steps took and brought. A turn is one sequence's part of a step in which no prompt was computed."""

    seconds: float = 0.0
    """Of all steps, prompts among them."""
    tokens: int = 0
    """All that were said."""
    decode_seconds: float = 0.0
    """Of steps without prompts, as are all that follow but what became of drafts."""
    draft_seconds: float = 0.0
    """Spent on guessing in them."""
    decode_tokens: int = 0
    turns: int = 0
    rows: int = 0
    guessed: int = 0
    """Tokens ahead that were guessed; of a tree its levels."""
    draft_tokens: int = 0
    """All guesses that were verified."""
    accepted: int = 0
    """Those that were right."""
    refused: int = 0
    """Drafts that did not go on where they might have."""
    copied_tokens: int = 0
    """Of `draft_tokens` those that were looked up, not computed."""
    copied_accepted: int = 0
    copied_refused: int = 0
    prompt_draft_seconds: float = 0.0
    """Spent on guessing in steps with prompts."""
    steps: Counter[int] = field(default_factory=Counter)
    """Without prompts, by rows."""

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        names = [field.name for field in fields(self)]
        return Tally(*map(operator.add, (getattr(self, n) for n in names), (getattr(other, n) for n in names)))

    @staticmethod
    def sum(tallies: Iterable[Tally]) -> Tally:
        """All together."""
        total = Tally()
        for tally in tallies:
            total = total.plus(tally)
        return total


@dataclass(slots=True)
class _Log(NullObserver):
    """The last step, and which of its drafts were right."""

    scheduled: SchedulerOutput | None = None
    seconds: float = 0.0
    verdicts: dict[int, tuple[int, int, bool, bool]] = field(default_factory=dict)
    """By sequence: guesses, those of them that were right, whether the text ended with them, and whether they were
    copied."""

    def verified(self, sequence: Running, drafted: int, accepted: int) -> None:
        self.verdicts[sequence.sequence_id] = drafted, accepted, sequence.finished, sequence.copied

    def stepped(self, scheduled: SchedulerOutput, times: StepTimes) -> None:
        self.scheduled, self.seconds = scheduled, times.ended - times.began


class Lane:
    """One method's engine. Owns it; `close` releases it."""

    def __init__(self, method: Method, core: EngineCore, log: _Log) -> None:
        """core: tells `log` of its steps."""
        self.method = method
        self.step_seconds: dict[int, list[float]] = {}
        """Of steps without prompts, by rows; without what guessing took."""
        self._core = core
        self._log = log

    @classmethod
    def load(cls, method: Method, setup: Setup) -> Self:
        """Loads the model. Nothing of a prompt is kept for the next. Raises what `load_engine` raises."""
        log = _Log()
        config = EngineConfig(
            max_model_len=setup.max_model_len,
            threads=setup.threads,
            scheduler=SchedulerConfig(setup.batch, max(setup.batch, BATCHED_TOKENS)),
            cache=CacheConfig(enable_prefix_caching=False),
            speculative=method.config,
        )
        return cls(method, load_engine(str(setup.path), config, observer=log).core, log)

    def answer(self, prompts: Sequence[tuple[int, ...]], max_tokens: int, salt: str) -> tuple[Tally, list[list[int]]]:
        """Answers prompts that come together, greedily: what it took, and the tokens of each answer.

        salt: what a drafter remembers of ended answers is for answers with the same one.
        """
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        for place, prompt in enumerate(prompts):
            self._core.add(Request(str(place), prompt, sampling, cache_salt=salt))
        answers: list[list[int]] = [[] for _ in prompts]
        tally = Tally()
        while self._core.has_work():
            tally = tally.plus(self._step(answers))
        return tally, answers

    def _step(self, answers: list[list[int]]) -> Tally:
        before = self._core.stats()
        self._log.verdicts.clear()
        for event in self._core.step():
            if isinstance(event, RequestFailed):
                raise event.error
            for part in event.outputs:
                answers[int(event.request_id)] += part.token_ids
        after = self._core.stats()
        return self._count(after.generated_tokens - before.generated_tokens, after.draft_seconds - before.draft_seconds)

    def _count(self, tokens: int, draft_seconds: float) -> Tally:
        log, scheduled = self._log, self._log.scheduled
        assert scheduled is not None
        parts = scheduled.sequences
        ahead = {part.sequence_id: 1 + max(levels(part.parents)) for part in parts if part.draft}
        known = [(ahead[name], *verdict) for name, verdict in log.verdicts.items()]
        verified = dict[str, int]()
        for prefix, several in (("", known), ("copied_", [verdict for verdict in known if verdict[-1]])):
            verified[f"{prefix}accepted"] = sum(accepted for _, _, accepted, _, _ in several)
            verified[f"{prefix}refused"] = sum(right < most and not ended for most, _, right, ended, _ in several)
        verified["draft_tokens"] = sum(drafted for _, drafted, *_ in known)
        verified["copied_tokens"] = sum(drafted for _, drafted, *_, copied in known if copied)
        if any(len(part.token_ids) != 1 or not part.sample for part in parts) or not parts:
            return Tally(seconds=log.seconds, tokens=tokens, prompt_draft_seconds=draft_seconds, **verified)
        rows = scheduled.num_tokens
        self.step_seconds.setdefault(rows, []).append(log.seconds - draft_seconds)
        return Tally(
            log.seconds, tokens, log.seconds, draft_seconds, tokens, len(parts), rows, sum(ahead.values()), **verified,
            steps=Counter((rows,)),
        )  # fmt: skip

    def close(self) -> None:
        """Releases the engine."""
        self._core.close()
