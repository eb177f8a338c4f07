"""`SchedulerState`: who runs and who waits, and what others may read of that."""

from __future__ import annotations

from collections.abc import Iterable

from kvarn.cache import BlockPool
from kvarn.config import SchedulerConfig
from kvarn.scheduler.admission import Backlog
from kvarn.scheduler.assembly import Group
from kvarn.scheduler.policy import Policy
from kvarn.scheduler.queue import WaitingQueue
from kvarn.scheduler.reuse import PrefixReuse
from kvarn.scheduler.sequence import Sequence


class SchedulerState:
    """The sequences of a scheduler. `Scheduler` changes it, and nobody else."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool, policy: Policy, reuse: PrefixReuse) -> None:
        self.policy = policy
        self.reuse = reuse
        self.backlog = Backlog()
        self._config = config
        self._pool = pool
        self._running: dict[int, Sequence] = {}
        self._waiting = WaitingQueue(policy)
        self._groups: dict[str, Group] = {}
        self._sequences: dict[int, Sequence] = {}
        self._finished_ids: list[int] = []
        """Of those that the runner has not been told of."""

    @property
    def num_running(self) -> int:
        """Sequences that take part in the steps."""
        return len(self._running)

    @property
    def running_ids(self) -> Iterable[int]:
        """Ids of the sequences that take part in the steps."""
        return self._running.keys()

    @property
    def num_running_tokens(self) -> int:
        """Tokens of those sequences, prompts and outputs."""
        return sum(sequence.num_tokens for sequence in self._running.values())

    @property
    def num_waiting(self) -> int:
        """Sequences that do not: new, preempted, or waiting for a prompt they share."""
        return len(self._sequences) - len(self._running)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that a sequence can have: empty ones, and those that only the prefix cache holds."""
        return self._pool.num_available

    @property
    def num_cached_blocks(self) -> int:
        """Those of `num_free_blocks` that the prefix cache holds."""
        return self._pool.num_idle

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return self._pool.num_blocks

    def has_work(self) -> bool:
        """Whether a step would do anything: compute, or tell the runner who has finished."""
        return bool(self._sequences or self._finished_ids)

    def check(self) -> None:
        """Raises AssertionError unless blocks, cache, queues and groups agree with one another. For tests."""
        sequences = list(self._sequences.values())
        self._pool.check([*(s.table.held for s in sequences), self.reuse.cache.check()])
        forks = {f.sequence_id for g in self._groups.values() for f in g.forks if not f.finished}
        assert forks | {s.sequence_id for s in (*self._running.values(), *self._waiting)} == set(self._sequences)
        assert len(forks) + len(self._running) + len(self._waiting) == len(sequences)
        assert len(self._running) <= self._config.max_num_seqs
        assert {i for g in self._groups.values() for i in g.sequences} == set(self._sequences)
        queued = [next(iter(g.sequences.values())).num_prompt_tokens for g in self._groups.values() if not g.started]
        assert self.backlog == Backlog(len(queued), sum(queued))
