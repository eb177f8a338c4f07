"""`PrefixReuse`: what sequences take from the prefix cache and its second tier, and what they leave there."""

from __future__ import annotations

from collections.abc import Hashable

from kvarn.cache import BlockPool, NullPrefixCache, PrefixCache, PrefixPath, common_length
from kvarn.request import Pooling, Request
from kvarn.scheduler.moves import AlwaysMove, Moves
from kvarn.scheduler.observer import Observer
from kvarn.scheduler.sequence import Sequence
from kvarn.step import BlockLoad, BlockSave


class PrefixReuse:
    """The scheduler's side of the prefix cache. It changes tables, paths and counts of computed tokens of sequences."""

    def __init__(
        self, pool: BlockPool, cache: PrefixCache | None, moves: Moves | None, observer: Observer
    ) -> None:
        """cache: of that pool; owned from now on; None: none. moves: when its second tier is used; None: always.

        observer: told of hits of running sequences, of loads, and of evictions.
        """
        self.cache = cache or NullPrefixCache()
        self._moves = moves or AlwaysMove()
        self.num_queries = 0
        """Tokens of the sequences that were admitted with an empty table, again after a preemption included."""
        self.num_hits = 0
        """Those of them whose KV was found."""
        self.num_loaded_tokens = 0
        """Those of the hits that came from the second tier."""
        self._pool = pool
        self._observer = observer
        self._loads: list[BlockLoad] = []
        self._computing: dict[Hashable, tuple[Sequence, int]] = {}
        """By the block they compute first: sequences with a chunk of a prompt in this step, and where it ends."""

    @property
    def num_evicted_tokens(self) -> int:
        """Tokens whose KV the cache has let go of."""
        return self.cache.num_evicted_tokens

    @property
    def num_saved_tokens(self) -> int:
        """Tokens whose KV was saved to the second tier; a block of one KV group of several counts for its share."""
        return self.cache.tier.num_saved * self._pool.block_size // len(self._pool.windows)

    def path(self, request: Request) -> PrefixPath:
        """The place of a new sequence of the request; one that finds nothing where every token must be computed."""
        cache = NullPrefixCache() if request.pooling is Pooling.MEAN else self.cache
        return cache.path((request.tenant, request.cache_salt))

    def end_step(self) -> tuple[tuple[BlockSave, ...], tuple[BlockLoad, ...]]:
        """What the step that was put together since the last call saves and loads."""
        loads, self._loads = tuple(self._loads), []
        self._computing.clear()
        return self.cache.tier.take_saves(), loads

    def adopt(self, sequence: Sequence, *, whole_blocks: bool = False) -> int:
        """Goes on from cached blocks where they reach beyond what the sequence has; returns how many tokens further.

        The last token is left to compute. whole_blocks: takes no block of which it needs a copy, so that it never
        needs more blocks than without.
        """
        known = sequence.num_computed_tokens
        if known >= sequence.num_tokens - 1 or sequence.lacks_prompt_logprobs:
            return 0
        found = sequence.prefix.adopt(sequence.token_ids, sequence.table, known, whole_blocks=whole_blocks)
        sequence.num_computed_tokens = found
        return found - known

    def catch_up(self, sequence: Sequence) -> None:
        """Lets a running sequence go on from what another has computed meanwhile."""
        found = self.adopt(sequence, whole_blocks=True)
        if found:
            self.count_hits(sequence, found)
            self._observer.found(sequence, found)

    def count_hits(self, sequence: Sequence, found: int) -> None:
        """Books tokens that the sequence need not compute."""
        self.num_hits += found
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens += found

    def to_whole_blocks(self, sequence: Sequence) -> None:
        """Gives up the block that the sequence would write into the copy of."""
        assert len(sequence.table) > sequence.prefix.num_blocks, "what fits alone does not fit"
        self.give_up_blocks(sequence)
        self.adopt(sequence, whole_blocks=True)

    def take_blocks(self, sequence: Sequence, start: int, end: int) -> list[tuple[int, int]]:
        """Takes the blocks to write positions start … end - 1, which are known to be available; returns the copies."""
        missing = sequence.table.blocks_needed(start, end) - self._pool.num_free
        if missing > 0:
            self._observer.evicted(self.cache.evict(missing, spill=self._moves.worth_saving()))
        return sequence.table.prepare_write(start, end)

    def give_up_blocks(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Empties the table. The cache keeps what it can, until somebody needs the blocks.

        keep: False where its KV is not to be believed. Then the cache lets go of all that the sequence computed or
        found there, but for what others go on from: they will see for themselves.
        """
        if keep:
            sequence.prefix.leave(sequence.token_ids, sequence.num_computed_tokens, sequence.table)
            sequence.table.release()
        else:
            sequence.prefix.disown(sequence.token_ids, sequence.table)
        sequence.num_computed_tokens = 0

    def forget(self) -> int:
        """Lets go of all that is cached and no sequence holds, in the second tier too; returns how many blocks that
        were. Between two steps. Declared prefixes stay."""
        count = self.cache.evict(self._pool.num_blocks, spill=False)
        self.cache.tier.forget()
        return count

    def computes(self, sequence: Sequence, end: int) -> None:
        """Told that the sequence computes its tokens up to `end` in this step."""
        if end - sequence.num_computed_tokens > 1:
            block = sequence.prefix.next_block(sequence.token_ids)
            if block is not None:
                self._computing[block] = sequence, end

    def repeats(self, sequence: Sequence, most: int) -> bool:
        """Whether half or more of what the sequence would compute in this step is computed in it by another.

        most: tokens that it would get.
        """
        if sequence.lacks_prompt_logprobs:
            return False
        leader, leader_end = self._computing.get(sequence.prefix.next_block(sequence.token_ids), (sequence, 0))
        if leader_end < (sequence.prefix.num_blocks + 1) * self._pool.block_size:
            return False  # it fills no block, so there would be no more to find in the next step
        start = sequence.num_computed_tokens
        end = min(sequence.num_tokens, start + most)
        return 2 * common_length(leader.token_ids[start:leader_end], sequence.token_ids[start:end]) >= end - start

    def computed(self, sequence: Sequence, end: int) -> None:
        """Told that the KV of the sequence's tokens up to `end` is in its blocks; files those that are filled.

        Blocks that fell out of a window are given back.
        """
        sequence.num_computed_tokens = end
        sequence.prefix.insert(sequence.token_ids, end, sequence.table)
        sequence.table.slide(end)

    def loads(self, sequence: Sequence) -> bool:
        """Whether blocks are loaded for the sequence in this step already."""
        return any(load.sequence_id == sequence.sequence_id for load in self._loads)

    def load(self, sequence: Sequence, most: int) -> bool:
        """Whether blocks of the second tier are loaded for the sequence in this step; then it waits for them.

        Its blocks must be available. most: tokens to load at most.
        """
        size, prefix = self._pool.block_size, sequence.prefix
        if sequence.num_computed_tokens >= sequence.num_tokens - 1 or sequence.lacks_prompt_logprobs:
            return False
        found = prefix.offloaded(sequence.token_ids, most // size)
        start = prefix.num_blocks * size
        whole = len(found) // len(self._pool.windows)
        end = start + whole * size
        if end < sequence.num_computed_tokens + size or not sequence.table.sees(start):
            return False
        if not self._moves.worth_loading(start, whole):
            return False
        self.count_hits(sequence, start - sequence.num_computed_tokens)
        sequence.table.truncate(prefix.num_blocks)
        sequence.num_computed_tokens = start
        self.take_blocks(sequence, start, end)
        slots, names = zip(*found, strict=True)
        columns = (sequence.table.column(index) for index in range(prefix.num_blocks, len(sequence.table)))
        blocks = tuple(block for column in columns for block in column)
        self._loads.append(BlockLoad(sequence.sequence_id, blocks, slots, names))
        return True

    def book_load(self, load: BlockLoad, count: int, sequence: Sequence | None) -> None:
        """Told how many blocks of a load were right. sequence: None where it has ended."""
        if count < len(load.names):
            self.cache.tier.drop(load.names[count])
        if sequence is None:
            return
        whole = count // len(self._pool.windows)
        loaded = whole * self._pool.block_size
        sequence.table.truncate(sequence.prefix.num_blocks + whole)
        self.computed(sequence, sequence.num_computed_tokens + loaded)
        self.num_loaded_tokens += loaded
        self.count_hits(sequence, loaded)
        self._observer.loaded(sequence, loaded)
