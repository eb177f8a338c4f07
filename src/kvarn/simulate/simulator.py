"""The simulator: the scheduler and the cache that serve, with a cost model for a model and a clock that jumps.

As the engine does between two steps, it hands over who has arrived, lets the scheduler decide, and books the result;
only that a step takes no time but what the cost model says it would. Sequences never end early: a request has as many
tokens as its traffic says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from kvarn.cache import BlockPool, NullPrefixCache, OffloadIndex, PrefixCache, RadixPrefixCache
from kvarn.errors import DeadlineError, RequestError
from kvarn.request import Request, SamplingParams
from kvarn.scheduler import MoveCost, NullObserver, Observer, StepCost, StepShape, StepTimes, make_scheduler
from kvarn.simulate.batching import NEVER, Gate, make_gate
from kvarn.simulate.results import Recorder, Results
from kvarn.simulate.settings import Settings
from kvarn.step import SampledToken, SchedulerOutput, StepOutput
from kvarn.traffic import Arrival

LEAST_SKIPPED, MOST_SKIPPED = 2, 1 << 20
OWN, SHARED, FIRST_FREE = 0, 1, 2
"""Token ids: what fills a request's own tokens and its group's; from the third on ids mark a request or a group."""
Progress = Callable[[int, int], None]


class DecodeCost(StepCost, Protocol):
    """A cost model that also predicts runs of decode steps quickly."""

    def decode_run(self, sequences: int, attended: int, steps: int) -> Iterator[float]:
        """Seconds of steps of one token for each of so many sequences, the same that `seconds` would say.

        attended: keys of the first step, to which each step adds one a sequence.
        """
        ...


def simulate(
    traffic: Sequence[Arrival],
    settings: Settings,
    cost: DecodeCost,
    *,
    observer: Observer | None = None,
    progress: Progress = lambda _done, _total: None,
) -> Results:
    """Serves the traffic to its end and says how it went. The same result for the same arguments.

    observer: told of everything as an engine's is, at virtual times. Raises ConfigError where the settings are wrong.
    """
    return Simulation(traffic, settings, cost, observer, progress).run()


class PromptMaker:
    """Token ids of prompts that have none: what requests of a group share is equal, all else differs.

    A group's and a request's own tokens begin with an id that no other has, so equal prefixes are those that are said
    to be. Where a prompt is its group's from begin to end, so is the answer: the next turn of a conversation hits it.
    """

    def __init__(self) -> None:
        self._groups: dict[str, int] = {}
        self._next = FIRST_FREE

    def prompt(self, arrival: Arrival) -> tuple[int, ...]:
        """The prompt of a request."""
        own = arrival.prompt_tokens - arrival.prefix_tokens
        shared: tuple[int, ...] = ()
        if arrival.prefix_tokens:
            mark = self._groups.get(arrival.prefix_group)
            if mark is None:
                mark = self._groups[arrival.prefix_group] = self._mark()
            shared = (mark, *(SHARED,) * (arrival.prefix_tokens - 1))
        return shared + ((self._mark(), *(OWN,) * (own - 1)) if own else ())

    @staticmethod
    def answer(arrival: Arrival) -> int:
        """The token that the answer consists of."""
        return SHARED if arrival.prefix_tokens == arrival.prompt_tokens else OWN

    def _mark(self) -> int:
        self._next += 1
        return self._next - 1


def _prefix_cache(pool: BlockPool, settings: Settings) -> PrefixCache:
    if not settings.prefix_cache:
        return NullPrefixCache()
    return RadixPrefixCache(pool, tier=OffloadIndex(settings.tier_slots, "simulated"))


class Simulation:
    """One run. `run` may be called once."""

    def __init__(
        self,
        traffic: Sequence[Arrival],
        settings: Settings,
        cost: DecodeCost,
        observer: Observer | None,
        progress: Progress,
    ) -> None:
        pool = BlockPool(settings.num_blocks, settings.block_size, settings.windows)
        move_seconds = settings.move_seconds
        self.scheduler = make_scheduler(
            settings.scheduler(),
            pool,
            settings.max_model_len,
            cost,
            prefix_cache=_prefix_cache(pool, settings),
            moves=MoveCost(settings.block_size, *(len(settings.windows) * move_seconds,) * 2, cost),
            observer=observer,
        )
        self._move_seconds = move_seconds
        self._traffic = traffic
        self._cost = cost
        self._gate: Gate = make_gate(settings.batching, settings.max_num_seqs, settings.window)
        self._observer = observer or NullObserver()
        self._may_skip = observer is None
        """Steps that somebody wants to be told of are taken one by one."""
        self._progress = progress
        self._prompts = PromptMaker()
        self._answers: dict[int, int] = {}
        self._recorder = Recorder(traffic, settings)
        self._arrived = 0
        self.now = 0.0

    def run(self) -> Results:
        """Serves to the end."""
        while True:
            self._take_arrivals()
            if self.scheduler.has_work():
                if not self._skip():
                    self._step()
                continue
            following = min(self._next_arrival(), self._gate.next_time())
            if following == NEVER:
                return self._recorder.results(self.now, self.scheduler)
            self.now = max(self.now, following)

    def _next_arrival(self) -> float:
        return self._traffic[self._arrived].time if self._arrived < len(self._traffic) else NEVER

    def _take_arrivals(self) -> None:
        """Hands to the scheduler who has come by now, as far as the way of batching lets them in."""
        while self._next_arrival() <= self.now:
            self._gate.arrive(self._traffic[self._arrived], self._arrived)
            self._arrived += 1
        last = self._arrived == len(self._traffic)
        for index, arrival in self._gate.release(self.now, self.scheduler.has_work(), last):
            self._add(index, arrival)

    def _add(self, index: int, arrival: Arrival) -> None:
        request = Request(
            request_id=str(index),
            prompt_token_ids=self._prompts.prompt(arrival),
            sampling=SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True),
            tenant=arrival.tenant,
        )
        try:
            (sequence,) = self.scheduler.add(request)
        except RequestError as error:
            self._recorder.refused(late=isinstance(error, DeadlineError))
            return
        self._answers[sequence.sequence_id] = self._prompts.answer(arrival)
        self._recorder.added(index, sequence.sequence_id)

    def _skip(self) -> bool:
        """Takes steps that are sure to be alike at once, up to the next event; False where there are none."""
        if not self._may_skip:
            return False
        steps = self.scheduler.steady_steps(MOST_SKIPPED)
        if steps < LEAST_SKIPPED:
            return False
        sequences = self.scheduler.num_running
        until = min(self._next_arrival(), self._gate.next_time(), self._recorder.next_window)
        began, taken = self.now, 0
        for seconds in self._cost.decode_run(sequences, self.scheduler.num_running_tokens, steps):
            before = self.now
            self.now += seconds
            if taken:
                self._recorder.gap(self.now - before, sequences)
            else:
                # One that was preempted may have got its last token long before this step.
                self._recorder.gaps(self.scheduler.running_ids, self.now)
            taken += 1
            if self.now >= until:
                break
        self.scheduler.skip(taken, self._answers)
        self._recorder.skipped(taken, self.scheduler.running_ids, self.now - began, self.now)
        return True

    def _step(self) -> None:
        began = self.now
        scheduled = self.scheduler.schedule()
        if scheduled.sequences:
            self.now += self._cost.seconds(StepShape.of(scheduled))
        loaded = tuple(len(load.blocks) for load in scheduled.block_loads)
        self.now += self._move_seconds * (len(scheduled.block_saves) + sum(loaded))
        answers = self._answers
        sampled = tuple(
            SampledToken(part.sequence_id, answers[part.sequence_id]) for part in scheduled.sequences if part.sample
        )
        gained = self.scheduler.update(scheduled, StepOutput(scheduled.step, sampled, loaded))
        self._recorder.stepped(scheduled, self.now - began, self.now)
        for sequence, _ in gained:
            self._recorder.sampled(sequence, self.now)
            if sequence.finished:
                del self._answers[sequence.sequence_id]
        self._observer.stepped(scheduled, StepTimes(began, began, self.now, self.now))
        self._tell(scheduled)

    def _tell(self, scheduled: SchedulerOutput) -> None:
        if scheduled.step % 4096 == 0:
            self._progress(self._recorder.num_ended, len(self._traffic))
