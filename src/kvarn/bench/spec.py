"""What guessing ahead brings on each task: measured in turns against no guesses, predicted, and why both differ."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from kvarn.bench.spec_lane import Lane, Method, Setup, Tally
from kvarn.bench.spec_prompts import TaskPrompt
from kvarn.bench.statistics import Spread

OFF = Method("off", None)
ALL = "all tasks"
LEAST_STEPS = 5
"""Steps of a number of rows from which their median is told."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Why:
    """Why a speedup is what it is: speedup = predicted × lengths × prompts, and predicted = E(α, K) / (1 + cK)."""

    guesses: float
    """K: tokens guessed ahead in a step of a sequence, on average, steps without guesses among them; of a tree its
    levels."""
    rows: float
    """Computed for a sequence in a step, on average."""
    step_cost: float
    """1 + cK: what a step takes for a sequence, guessing among it, against one without guesses."""
    drafting: float
    """Of that what guessing takes."""
    cost: float
    """c: what a guess costs against a step without guesses, making and verifying it."""
    decode_speedup: float
    """Of tokens a second in steps that compute no prompt."""
    lengths: float
    """Tokens a step, against what α gives with K guesses in every step: less than 1 where guesses are of varying length
    or not alike."""
    prompts: float
    """What of the speedup the prompts leave, which are computed without guesses."""


@dataclass(frozen=True, slots=True)
class Source:
    """The guesses of a method that came in one way."""

    name: str
    """copied: looked up in what was known; computed: by a model or heads."""
    draft_tokens: int
    accepted_tokens: int
    acceptance: float
    """As in `Row`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one task."""

    task: str
    method: str
    num_prompts: int
    num_equal: int
    """Prompts whose answers were those without guesses, token by token, in every round."""
    acceptance: float | None
    """α: the share of guesses that were right, of those before which all were; None where nothing was guessed."""
    length: float | None
    """Tokens a step of a sequence, on average; None where the first token ended every answer."""
    tokens_per_s: Spread
    speedup: Spread
    """Time without guesses over time with them, prompts among it, of each round."""
    predicted: float | None
    """(1 - α^(K+1)) / ((1 - α)(1 + cK)): Leviathan et al. 2023, theorem 3.8, with what was measured here."""
    why: Why | None
    """None without guesses."""
    draft_tokens: int
    accepted_tokens: int
    seconds: tuple[float, ...]
    """Of each round."""
    sources: tuple[Source, ...] = ()
    """Those of which guesses were verified."""
    counted: float | None = None
    """The speedup if every step without prompts took the median of all methods' steps of as many rows, and prompts what
    they take without guesses: the machine's moods are not in it, nor what a method takes beside guessing."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """The results of `kvarn bench spec`. Rows: by task, the first method of each is `off`."""

    rows: tuple[Row, ...]
    row_costs: dict[int, float]
    """What a step of so many rows takes against a plain one, guessing not counted: medians."""
    plain_rows: int
    """Of the plain one."""


@dataclass(slots=True)
class _Taken:
    """What one method did on one task: a tally for each round, and which prompts it answered otherwise."""

    rounds: list[Tally]
    different: set[tuple[int, ...]] = field(default_factory=set)


Taken = dict[tuple[str, str], _Taken]
"""By task and method."""


def with_off(methods: Sequence[Method]) -> list[Method]:
    """The methods, no guesses first, which the others are measured against."""
    return [OFF, *(method for method in methods if method.config is not None)]


def measure_speculation(
    setup: Setup,
    prompts: Sequence[TaskPrompt],
    methods: Sequence[Method],
    *,
    rounds: int,
    progress: Progress = lambda _done, _total: None,
) -> Speculation:
    """Answers the prompts with each method, in turns: every few prompts that come together (setup.batch) are answered
    by one engine after the other before the next are. A round before the others warms up and is not counted, but for
    whether answers are equal."""
    with ExitStack() as stack:
        lanes: list[Lane] = []
        for method in with_off(methods):
            lanes.append(Lane.load(method, setup))
            stack.callback(lanes[-1].close)
        taken = _in_turns(lanes, setup, prompts, rounds, progress)
        counts = Counter(prompt.task for prompt in prompts)
        times = median_times([lane.step_seconds for lane in lanes])
        rows = [make_row(taken, task, lane.method.name, counts[task], times) for task in counts for lane in lanes]
        if len(counts) > 1:
            together = _together(taken, list(counts))
            rows += [make_row(together, ALL, lane.method.name, len(prompts), times) for lane in lanes]
        return Speculation(tuple(rows), *row_costs([lane.step_seconds for lane in lanes]))


def _groups(prompts: Sequence[TaskPrompt], batch: int) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """The task and prompts of each few that come together."""
    tasks: dict[str, list[tuple[int, ...]]] = {}
    for prompt in prompts:
        tasks.setdefault(prompt.task, []).append(prompt.token_ids)
    for task, several in tasks.items():
        for start in range(0, len(several), batch):
            yield task, several[start : start + batch]


def _in_turns(
    lanes: Sequence[Lane], setup: Setup, prompts: Sequence[TaskPrompt], rounds: int, progress: Progress
) -> Taken:
    groups = list(_groups(prompts, setup.batch))
    taken: Taken = {}
    done, total = 0, (rounds + 1) * len(groups) * len(lanes)
    progress(0, total)
    for number in range(rounds + 1):
        if number == 1:
            for lane in lanes:
                lane.step_seconds.clear()
        for place, (task, group) in enumerate(groups):
            answers: dict[str, list[list[int]]] = {}
            for turn in range(len(lanes)):
                lane = lanes[(number + place + turn) % len(lanes)]
                tally, answers[lane.method.name] = lane.answer(group, setup.max_tokens, f"round {number}")
                own = taken.setdefault((task, lane.method.name), _Taken([Tally() for _ in range(rounds)]))
                if number:
                    own.rounds[number - 1] = own.rounds[number - 1].plus(tally)
                done += 1
                progress(done, total)
            for name, said in answers.items():
                wrong = (p for p, a, b in zip(group, said, answers[OFF.name], strict=True) if a != b)
                taken[task, name].different.update(wrong)
    return taken


def _together(taken: Taken, tasks: Sequence[str]) -> Taken:
    """All tasks as one."""
    result: Taken = {}
    for name in {name: None for _, name in taken}:
        several = [taken[task, name] for task in tasks]
        rounds = [Tally.sum(same) for same in zip(*(each.rounds for each in several), strict=True)]
        result[ALL, name] = _Taken(rounds, set[tuple[int, ...]]().union(*(each.different for each in several)))
    return result


def make_row(taken: Taken, task: str, name: str, num_prompts: int, times: Mapping[int, float]) -> Row:
    """The figures of a method on a task. times: see `median_times`."""
    plain, own = taken[task, OFF.name].rounds, taken[task, name]
    total = Tally.sum(own.rounds)
    judged = total.accepted + total.refused
    acceptance = total.accepted / judged if judged else None
    speedup = Spread.of([a.seconds / b.seconds for a, b in zip(plain, own.rounds, strict=True)])
    why = None if acceptance is None else explain(plain, own.rounds, acceptance, speedup.median)
    return Row(
        task=task,
        method=name,
        num_prompts=num_prompts,
        num_equal=num_prompts - len(own.different),
        acceptance=acceptance,
        length=total.decode_tokens / total.turns if total.turns else None,
        tokens_per_s=Spread.of([tally.tokens / tally.seconds for tally in own.rounds]),
        speedup=speedup,
        predicted=None if why is None or acceptance is None else expected(acceptance, why.guesses) / why.step_cost,
        why=why,
        draft_tokens=total.draft_tokens,
        accepted_tokens=total.accepted,
        seconds=tuple(tally.seconds for tally in own.rounds),
        sources=sources(total),
        counted=counted(Tally.sum(plain), total, times),
    )


def sources(total: Tally) -> tuple[Source, ...]:
    """What became of the guesses of each source of which there were any."""
    counts = (
        ("copied", total.copied_tokens, total.copied_accepted, total.copied_refused),
        ("computed", total.draft_tokens - total.copied_tokens, total.accepted - total.copied_accepted,
         total.refused - total.copied_refused),
    )  # fmt: skip
    return tuple(
        Source(name, drafted, right, right / (right + wrong)) for name, drafted, right, wrong in counts if right + wrong
    )


def median_times(lanes: Sequence[Mapping[int, Sequence[float]]]) -> dict[int, float]:
    """Seconds of a step of so many rows, whatever the method: by rows. lanes: seconds of steps by rows."""
    seconds: dict[int, list[float]] = {}
    for lane in lanes:
        for rows, several in lane.items():
            seconds.setdefault(rows, []).extend(several)
    return {rows: statistics.median(several) for rows, several in seconds.items()}


def counted(plain: Tally, tally: Tally, times: Mapping[int, float]) -> float:
    """See `Row.counted`. plain, tally: of all rounds, without guesses and with them."""
    prompts = plain.seconds - plain.decode_seconds

    def seconds(one: Tally) -> float:
        steps = sum(count * times[rows] for rows, count in one.steps.items())
        return prompts + steps + one.draft_seconds + one.prompt_draft_seconds

    return seconds(plain) / seconds(tally)


def explain(plain: Sequence[Tally], rounds: Sequence[Tally], acceptance: float, speedup: float) -> Why | None:
    """What a speedup is made of; None where there was no step to guess in. plain, rounds: tallies of each round,
    without guesses and with them."""
    total = Tally.sum(rounds)
    if not total.guessed or not all(tally.turns for tally in (*plain, *rounds)):
        return None
    ratios = [_step_seconds(b) / _step_seconds(a) for a, b in zip(plain, rounds, strict=True)]
    step_cost, guesses = statistics.median(ratios), total.guessed / total.turns
    length = total.decode_tokens / total.turns
    without = Tally.sum(plain)
    decode_speedup = length * without.turns / without.decode_tokens / step_cost
    return Why(
        guesses=guesses,
        rows=total.rows / total.turns,
        step_cost=step_cost,
        drafting=step_cost * total.draft_seconds / total.decode_seconds,
        cost=(step_cost - 1) / guesses,
        decode_speedup=decode_speedup,
        lengths=length / expected(acceptance, guesses),
        prompts=speedup / decode_speedup,
    )


def _step_seconds(tally: Tally) -> float:
    return tally.decode_seconds / tally.turns


def expected(acceptance: float, guesses: float) -> float:
    """Tokens of a step in which so many are guessed ahead, each right with the same probability, whatever the others
    are: (1 - α^(K+1)) / (1 - α)."""
    if acceptance == 1.0:
        return guesses + 1
    return (1 - math.pow(acceptance, guesses + 1)) / (1 - acceptance)


def row_costs(lanes: Sequence[Mapping[int, Sequence[float]]]) -> tuple[dict[int, float], int]:
    """What steps of more rows take against plain ones, by rows, and the rows of a plain one. lanes: seconds of steps by
    rows, the first without guesses."""
    plain = max(lanes[0], key=lambda rows: len(lanes[0][rows]), default=0)
    if not plain:
        return {}, 0
    base = statistics.median(lanes[0][plain])
    seconds: dict[int, list[float]] = {}
    for lane in lanes[1:]:
        for rows, several in lane.items():
            if rows > plain:
                seconds.setdefault(rows, []).extend(several)
    told = sorted((rows, several) for rows, several in seconds.items() if len(several) >= LEAST_STEPS)
    return {rows: statistics.median(several) / base for rows, several in told}, plain
