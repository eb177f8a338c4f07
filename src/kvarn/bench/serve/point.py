"""One measurement of one server under one load, and what does not change between such measurements."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvarn.bench.serve.answers import Answer, read_answer
from kvarn.bench.serve.client import Client, ServerError, Target, open_client
from kvarn.bench.serve.datasets import Dataset, Prompt
from kvarn.bench.serve.load import Extent
from kvarn.bench.serve.metrics import Summary, summarize
from kvarn.bench.serve.offer import Offer
from kvarn.bench.serve.slo import Slo
from kvarn.bench.serve.tokens import PROBE_WORDS, TokenScale

Progress = Callable[[str, float], None]
"""Called with what is measured, and the share of it that is done."""


def silent(_what: str, _share: float) -> None:
    """No progress."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What is asked and how it is judged."""

    dataset: Dataset
    extent: Extent
    slo: Slo
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement. broken: why the SLO does not hold, "" where it does."""

    offer: str
    size: float
    """Requests a second or at a time."""
    summary: Summary
    broken: str
    answers: list[Answer] = field(repr=False)
    """All of them, those of the warm-up too."""

    @property
    def holds(self) -> bool:
        """Whether the SLO does."""
        return not self.broken


@dataclass(frozen=True, slots=True)
class Lane:
    """A server that is ready to be measured."""

    client: Client
    model: str
    scale: TokenScale

    @property
    def url(self) -> str:
        """As it was given."""
        return self.client.target.url

    async def measure(self, bench: Bench, offer: Offer, turn: str, progress: Progress = silent) -> Point:
        """One load to its end. turn: tells this load's requests from those of others; the same turn, the same requests.

        Streams are read after the last answer, so that reading them disturbs nothing.
        """
        seed = f"{bench.seed} {turn}"
        what, begin = f"{self.url}, {offer.name}", time.perf_counter()

        def told(done: int) -> None:
            progress(what, bench.extent.share(done, time.perf_counter() - begin))

        bodies = self.bodies(bench.dataset.prompts(seed, self.scale))
        load = await offer.run(self.client, bodies, bench.extent, seed, told)
        progress(what, 1.0)
        window = load.window(bench.extent)
        answers = [read_answer(reply, load.begin) for reply in load.replies]
        load.replies.clear()
        summary = summarize(answers, window, bench.slo, load.client)
        return Point(offer.name, offer.size, summary, bench.slo.broken(summary), answers)

    def bodies(self, prompts: Iterator[Prompt]) -> Iterator[bytes]:
        """Requests' bodies, made as they are needed."""
        return (self.client.target.body(prompt, self.model) for prompt in prompts)


@asynccontextmanager
async def open_lane(target: Target, dataset: Dataset) -> AsyncIterator[Lane]:
    """A lane to a server that was asked for its model and for the tokens of two prompts of the dataset.

    Raises ServerError where it does not answer them.
    """
    async with open_client(target) as client:
        model = target.model or (await client.models())[0]
        yield Lane(client, model, await _scale(client, model, dataset))


async def _scale(client: Client, model: str, dataset: Dataset) -> TokenScale:
    counts = []
    for words in PROBE_WORDS:
        text = dataset.sample(words)
        answer = read_answer(await client.ask(client.target.body(Prompt.of(text, 1), model)))
        if answer.failure:
            said = f": {answer.detail}" if answer.detail else ""
            hint = " (--no-ignore-eos leaves that field out)" if "ignore_eos" in answer.detail else ""
            raise ServerError(f"{client.target.url}: a first short request failed, {answer.failure}{said}{hint}")
        counts.append(answer.prompt_tokens)
    return TokenScale.through(PROBE_WORDS, (counts[0], counts[1]))
