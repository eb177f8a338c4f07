"""The model's own answers with the hidden states they came from: what heads learn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvarn.engine import EngineCore
from kvarn.engine.events import RequestFailed
from kvarn.program import Program
from kvarn.request import Request, SamplingParams
from kvarn.runner import BlocklessDrafter, Proposal
from kvarn.step import NewSequence, SampledToken, SchedulerOutput
from kvarn.training.store import TextStore

HELD_OUT_EVERY = 20
"""Of so many prompts one is held out: heads are measured by it, not trained."""


@dataclass(slots=True)
class _Running:
    """A sequence: its tokens, and float16[rows, width] for those of them that were computed."""

    number: int
    prompt_length: int
    tokens: list[int]
    rows: list[NDArray[np.float16]] = field(default_factory=list)
    computed: int = 0


class Recorder(BlocklessDrafter):
    """A drafter that guesses nothing: it keeps what it is shown, and puts ended sequences into a store.

    A sequence's seed is its prompt's number. Needs an engine without a prefix cache: rows that are not computed are not
    seen.
    """

    def __init__(self, program: Program, store: TextStore) -> None:
        self.buffers: Sequence[str] = (program.last_layer,)
        self.full = False
        """Whether a text did not fit."""
        self._store = store
        self._running: dict[int, _Running] = {}

    def add(self, sequence: NewSequence) -> None:
        """See `Drafter.add`."""
        ids = list(sequence.prompt_token_ids)
        self._running[sequence.sequence_id] = _Running(sequence.seed, len(ids), ids)

    def remove(self, sequence_id: int) -> None:
        """Keeps the text."""
        ended = self._running.pop(sequence_id, None)
        if ended is None or ended.computed + 1 != len(ended.tokens) or len(ended.tokens) == ended.prompt_length:
            return
        features = np.concatenate(ended.rows)
        self.full |= not self._store.add(ended.number, ended.prompt_length, np.array(ended.tokens, np.int32), features)

    def finish(self) -> None:
        """Keeps the texts of all sequences; call it when all have ended, since the last ones are not removed."""
        for sequence_id in tuple(self._running):
            self.remove(sequence_id)

    def propose(
        self,
        scheduled: SchedulerOutput,
        sampled: Sequence[SampledToken],
        values: Mapping[str, NDArray[np.float32]],
    ) -> Sequence[Proposal]:
        """Guesses nothing."""
        for token in sampled:
            self._running[token.sequence_id].tokens.append(token.token_id)
        rows = unit_rows(values[self.buffers[0]])
        row = 0
        for part in scheduled.sequences:
            running, end = self._running[part.sequence_id], row + len(part.token_ids)
            new = end - row - (running.computed - part.start)  # what was computed before a preemption comes again
            if new > 0:
                running.rows.append(rows[end - new : end])
                running.computed += new
            row = end
        return ()


def unit_rows(rows: NDArray[np.float32]) -> NDArray[np.float16]:
    """Rows scaled to a mean square of 1."""
    scales = np.sqrt(np.mean(np.square(rows, dtype=np.float64), axis=1, keepdims=True))
    scaled: NDArray[np.float64] = rows / np.maximum(scales, 1e-20)
    return scaled.astype(np.float16)


def collect(
    core: EngineCore,
    recorder: Recorder,
    prompts: Callable[[int], Sequence[int]],
    numbers: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    max_num_seqs: int,
    enough: Callable[[], bool],
    progress: Callable[[int], None],
) -> None:
    """Lets the engine answer prompts, in order, until all are answered, the store is full, or it is enough.

    prompts: a prompt's tokens by its number. Those that are held out are answered with the likeliest tokens, the others
    at `temperature`. progress: told the number of tokens generated.
    """
    waiting = list(reversed(numbers))
    in_flight = generated = 0
    while (waiting and not recorder.full and not enough()) or core.has_work():
        while waiting and in_flight < 2 * max_num_seqs and not recorder.full and not enough():
            number = waiting.pop()
            held_out = number % HELD_OUT_EVERY == 0
            sampling = SamplingParams(
                max_tokens=max_tokens, temperature=0.0 if held_out else temperature, seed=number
            )
            core.add(Request(str(number), tuple(prompts(number)), sampling))
            in_flight += 1
        for event in core.step():
            if isinstance(event, RequestFailed):
                raise event.error
            in_flight -= event.finished
            generated += 1
        progress(generated)
    recorder.finish()
