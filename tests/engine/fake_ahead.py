"""A back-end that works while its caller does, on the CPU: what is submitted is computed now, or as late as may be."""

from collections import deque

import numpy as np
from tiny_engine import Wrapper

from kvarn.backends import InputBatch
from kvarn.runner.ahead import StepsAhead
from kvarn.sampling.reference import choose
from kvarn.sampling.rules import RuleBook


class AheadOnCpu(Wrapper):
    """`AheadExecutable` over an executable. late: all that may wait waits until its result is asked for."""

    def __init__(self, inner, *, late, poison=()):
        """poison: numbers of submitted steps whose first row of logits is NaN."""
        super().__init__(inner)
        self.late = late
        self.poison = set(poison)
        self.num_submitted = 0
        self.num_fed = 0
        """Tokens that nobody had read when their step was submitted."""
        self.num_executed = 0
        self.most_under_way = 0
        self._work = deque()
        self._chosen = deque()
        self._last = np.zeros(0, np.int32)

    @property
    def program(self):
        return self.inner.program

    def submit(self, batch, rules, previous):
        arrays = {name: np.array(value) for name, value in vars_of(batch).items()}
        number, given, previous = self.num_submitted, previous, previous.copy()
        self.num_submitted += 1
        self.num_fed += int((previous >= 0).sum())
        assert rules.rows.size == batch.output_rows.size

        def run():
            ids = np.where(previous >= 0, np.maximum(self._last, 0)[np.maximum(previous, 0)] if self._last.size else 0,
                           arrays["token_ids"])  # fmt: skip
            values = self.inner.execute(InputBatch(**{**arrays, "token_ids": ids.astype(np.int32)}))
            logits = values["logits"].copy()
            if number in self.poison:
                logits[0] = np.nan
            self._last = choose(logits, rules, self._last)
            self._chosen.append(self._last)

        self._begin(run)
        self.most_under_way = max(self.most_under_way, self.under_way)
        # What the caller does with its arrays from now on is nobody's business.
        for array in (batch.positions, batch.slot_mapping, given):
            array.fill(-9)
        batch.token_ids.fill(0)

    @property
    def under_way(self):
        return sum(work.__name__ == "run" for work in self._work) + len(self._chosen)

    def collect(self):
        while not self._chosen:
            self._work.popleft()()
        return self._chosen.popleft()

    def discard(self):
        self._work.clear()
        self._chosen.clear()

    def execute(self, batch, outputs=()):
        self._catch_up()
        self.num_executed += 1
        return self.inner.execute(batch, outputs)

    def copy_blocks(self, pairs):
        pairs = list(pairs)
        self._begin(lambda: self.inner.copy_blocks(pairs))

    def read_block(self, block, out):
        self._catch_up()
        self.inner.read_block(block, out)

    def write_block(self, block, data):
        self._catch_up()
        self.inner.write_block(block, data)

    def _begin(self, work):
        self._work.append(work)
        if not self.late:
            self._catch_up()

    def _catch_up(self):
        while self._work:
            self._work.popleft()()


def vars_of(batch):
    return {
        name: getattr(batch, name)
        for name in ("token_ids", "positions", "slot_mapping", "query_start", "seq_lens", "block_tables", "output_rows")
    }


def steps_ahead(executable, vocab_size):
    return StepsAhead(executable, RuleBook(vocab_size))
