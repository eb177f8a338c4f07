"""`SteadySteps`: runs of steps that are sure to be alike, counted and booked at once. For who simulates."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as ListOf

from kvarn.cache import BlockPool
from kvarn.scheduler.policy import Policy
from kvarn.scheduler.reuse import PrefixReuse
from kvarn.scheduler.sequence import Sequence


class SteadySteps:
    """Steps in which every running sequence computes one token and samples the next. It changes the sequences."""

    def __init__(self, pool: BlockPool, policy: Policy, reuse: PrefixReuse) -> None:
        self._pool = pool
        self._policy = policy
        self._reuse = reuse

    def count(self, running: Collection[Sequence], limit: int) -> int:
        """How many come, at most `limit`, if nobody is admitted and no token ends a sequence."""
        if not running or any(s.num_uncomputed_tokens != 1 or not s.num_output_tokens for s in running):
            return 0
        steps = min(limit, min(s.max_length - s.num_tokens for s in running) - 1)
        # Evicting goes on as in single steps; equal blocks that become one in the prefix cache only leave more free.
        # Into a second tier it does not: what that takes is a part of the step.
        evicting = not self._reuse.cache.tier.num_slots
        room = self._pool.num_available if evicting else self._pool.num_free
        while steps > 0 and self._blocks_to_grow(running, steps, evicting) > room:
            steps //= 2
        return max(0, steps)

    def take(self, running: ListOf[Sequence], steps: int, token_ids: Mapping[int, int]) -> None:
        """Books so many of them. running: in the policy's order. token_ids: by sequence, what it samples in each."""
        lanes = [self._policy.lane(sequence) for sequence in running]
        for _ in range(steps):
            for lane in lanes:
                self._policy.charge_output(lane)
        starts = [sequence.num_computed_tokens for sequence in running]
        for sequence in running:
            sequence.token_ids += [token_ids[sequence.sequence_id]] * steps
        # In the order of the steps, since what is filed and let go decides how many blocks are evicted, and which.
        begun, booked = self._begun_blocks(starts, steps), self._booked(starts, steps)
        for step in sorted(begun.keys() | booked.keys()):
            for place in sorted({*begun.get(step, ()), *booked.get(step, ())}):
                self._reuse.computed(running[place], starts[place] + step)
            for place in begun.get(step, ()):
                start = starts[place] + step
                self._reuse.take_blocks(running[place], start, start + 1)
        for sequence, start in zip(running, starts, strict=True):
            self._reuse.computed(sequence, start + steps)

    def _begun_blocks(self, starts: ListOf[int], steps: int) -> dict[int, list[int]]:
        """By step, the places of those that write a block's first token in it; all in the first.

        A block that is filled in a step is followed by one that is begun in the next, but for the last step.
        """
        size = self._pool.block_size
        begun: dict[int, list[int]] = {0: list(range(len(starts)))}
        for place, start in enumerate(starts):
            for step in range(-start % size or size, steps, size):
                begun.setdefault(step, []).append(place)
        return begun

    def _booked(self, starts: ListOf[int], steps: int) -> dict[int, list[int]]:
        """By step, the places of those of which a block has fallen out of a window before it."""
        windows = self._pool.windows
        booked: dict[int, list[int]] = {}
        for group in range(len(windows)):
            for place, start in enumerate(starts):
                for step in windows.falls(group, start, steps):
                    booked.setdefault(step, []).append(place)
        return booked

    def _blocks_to_grow(self, running: Collection[Sequence], steps: int, evicting: bool) -> int:
        """Blocks that they take; evicting: but for those that fall out of windows meanwhile."""
        starts = ((s.table, s.num_computed_tokens) for s in running)
        if evicting:
            return sum(table.blocks_to_reach(start, start + steps, 1) for table, start in starts)
        return sum(table.blocks_needed(start, start + steps) for table, start in starts)
