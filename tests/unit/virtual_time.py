"""The real scheduler in a time that only steps move: arrivals at given moments, each step as long as a cost says."""

import itertools
import random
from dataclasses import dataclass

from kvarn.cache import BlockPool
from kvarn.config import SchedulerConfig
from kvarn.request import Request, SamplingParams
from kvarn.scheduler import Scheduler, StepShape
from kvarn.step import SampledToken, StepOutput

BLOCK = 16


@dataclass(frozen=True)
class Arrival:
    """A request to come."""

    time: float
    tenant: str
    prompt_tokens: int
    output_tokens: int


class LinearCost:
    """A machine on which a step takes a fixed time, and more for each token and each key it looks at."""

    def __init__(self, fixed=0.004, token=0.001, sampled=0.0005, attended=2e-7):
        self.fixed, self.token, self.sampled, self.attended = fixed, token, sampled, attended

    def seconds(self, shape):
        return (
            self.fixed
            + self.token * shape.num_tokens
            + self.sampled * shape.num_sampled
            + self.attended * shape.num_attended
        )


def poisson(tenant, rate, until, *, prompt, output, seed):
    """Arrivals of one tenant at random moments, sizes between half and one and a half of the given ones."""
    rng, now = random.Random(seed), 0.0
    while (now := now + rng.expovariate(rate)) < until:
        sizes = (rng.randint(size // 2, size + size // 2) for size in (prompt, output))
        yield Arrival(now, tenant, *sizes)


def execute(step):
    """Says the same token always. What a step reads and writes is looked at elsewhere (`paged_model`)."""
    return StepOutput(step.step, tuple(SampledToken(part.sequence_id, 0) for part in step.sequences if part.sample))


def simulate(arrivals, policy, cost, *, budget=None, seqs=32, tokens=256, blocks=4096, max_model_len=4096):
    """Runs until all arrivals are answered. Returns (arrival, time of each of its tokens) in order of arrival."""
    arrivals = sorted(arrivals, key=lambda a: a.time)
    config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_num_queued_requests=10**6)
    scheduler = Scheduler(config, BlockPool(blocks, BLOCK), max_model_len, policy=policy, budget=budget)
    coming, now = enumerate(arrivals), 0.0
    upcoming = next(coming, None)
    times = {}
    while upcoming is not None or scheduler.has_work():
        if not scheduler.has_work():
            now = max(now, upcoming[1].time)
        while upcoming is not None and upcoming[1].time <= now:
            number, arrival = upcoming
            prompt = tuple(itertools.repeat(1, arrival.prompt_tokens))
            sampling = SamplingParams(max_tokens=arrival.output_tokens)
            scheduler.add(Request(str(number), prompt, sampling, tenant=arrival.tenant))
            times[str(number)] = []
            upcoming = next(coming, None)
        scheduled = scheduler.schedule()
        now += cost.seconds(StepShape.of(scheduled))
        for sequence, _ in scheduler.update(scheduled, execute(scheduled)):
            times[sequence.request.request_id].append(now)
    return [(arrival, times[str(number)]) for number, arrival in enumerate(arrivals)]


def percentile(values, share):
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)]


def ttfts(answers, tenant):
    return [times[0] - arrival.time for arrival, times in answers if arrival.tenant == tenant]


def gaps(answers):
    """Times between the tokens of each answer."""
    return [after - before for _, times in answers for before, after in itertools.pairwise(times)]
