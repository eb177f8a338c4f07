"""The radix cache against the plainest one: a list of all texts, of which the longest common beginning counts."""

import hypothesis.strategies as st
from hypothesis.stateful import Bundle, consumes, initialize, invariant, multiple, rule
from state_machines import CountedMachine, run_machine

from kvarn.cache import BlockPool, BlockTable, RadixPrefixCache, common_length

SIZE = 3
DECLARED = ((0, 1, 0, 1, 0, 1, 1), (0, 1, 0, 0, 0, 0))
TEXTS = st.sampled_from([(0, 1) * 8, (1, 1, 0) * 5, (0,) * 15])
TOKENS = st.builds(
    lambda text, length, tail: [*text[:length], *tail],
    TEXTS,
    st.integers(1, 15),
    st.lists(st.integers(0, 1), max_size=3),
)
"""Few, so that they often begin the same."""
SALTS = st.sampled_from([("a", ""), ("a", "x"), ("b", "")])


class Live:
    """A sequence that holds a table."""

    def __init__(self, salt, tokens, table, path, known):
        self.salt, self.tokens, self.table, self.path, self.known = salt, tokens, table, path, known


class CacheMachine(CountedMachine):
    """Sequences of few different tokens come, grow, fork and go over a small pool, blocks being evicted at random."""

    live = Bundle("live")

    @initialize(blocks=st.integers(6, 40))
    def start(self, blocks):
        self.pool = BlockPool(blocks, SIZE)
        self.cache = RadixPrefixCache(self.pool, DECLARED)
        self.tables = []
        self.texts = {}
        """By salt: what has been computed. Of other salts only declared blocks count."""
        self.contents = {}
        """By block: the text up to each token in it, as it was written."""

    def known_to(self, salt, tokens):
        """How many of `tokens`, but the last, a cache that forgets nothing has for this salt."""
        most = max((common_length(text, tokens) for text in self.texts.get(salt, ())), default=0)
        for text in (text for texts in self.texts.values() for text in texts):
            for prefix in DECLARED:
                whole = len(prefix) // SIZE * SIZE
                common = common_length(text, prefix[:whole]) // SIZE * SIZE
                most = max(most, common_length(prefix[:common], tokens))
        return min(most, len(tokens) - 1)

    @rule(target=live, salt=SALTS, tokens=TOKENS)
    def come(self, salt, tokens):
        table, path = BlockTable(self.pool), self.cache.path(salt)
        available, order = self.pool.num_available, list(self.pool._idle)
        hit = path.peek(tokens)
        assert list(self.pool._idle) == order, "to look is not to use"
        known = path.adopt(tokens, table, 0)
        assert hit.num_tokens == known
        taken = known // SIZE - hit.num_held_blocks
        assert taken <= available - self.pool.num_available <= taken + (known % SIZE > 0)
        assert known <= self.known_to(salt, tokens)
        if not self.cache.num_evicted_tokens:
            assert known == self.known_to(salt, tokens), "nothing was evicted, so all is there"
        sequence = Live(salt, list(tokens), table, path, known)
        self.tables.append(sequence)
        self.read(sequence)
        return sequence

    @rule(sequence=live, more=st.lists(st.integers(0, 1), max_size=5), upto=st.integers(1, 20))
    def compute(self, sequence, more, upto):
        if sequence.known == len(sequence.tokens):
            sequence.tokens += more
        end = min(len(sequence.tokens), sequence.known + upto)
        needed = sequence.table.blocks_needed(sequence.known, end)
        if end == sequence.known or needed > self.pool.num_available:
            return
        self.cache.evict(needed - self.pool.num_free)
        for source, copy in sequence.table.prepare_write(sequence.known, end):
            self.contents[copy] = list(self.contents[source])
        for position in range(sequence.known, end):
            texts = self.contents.setdefault(sequence.table[position // SIZE], [None] * SIZE)
            texts[position % SIZE] = tuple(sequence.tokens[: position + 1])
        sequence.known = end
        sequence.path.insert(sequence.tokens, end, sequence.table)
        self.texts.setdefault(sequence.salt, []).append(tuple(sequence.tokens[: end // SIZE * SIZE]))
        self.read(sequence)

    @rule(sequence=live)
    def go_on(self, sequence):
        """As a running sequence does before it computes a chunk."""
        before = self.pool.num_available - sequence.table.blocks_needed(sequence.known, len(sequence.tokens))
        if sequence.known < len(sequence.tokens) - 1:
            known = sequence.path.adopt(sequence.tokens, sequence.table, sequence.known, whole_blocks=True)
            assert known >= sequence.known
            sequence.known = known
            after = self.pool.num_available - sequence.table.blocks_needed(known, len(sequence.tokens))
            assert after >= before, "it needs no more blocks than without"
            self.read(sequence)

    @rule(target=live, sequence=live, tokens=st.integers(0, 14))
    def fork(self, sequence, tokens):
        tokens = min(tokens, sequence.known)
        child = Live(
            sequence.salt, sequence.tokens[:tokens], sequence.table.fork(tokens), sequence.path.fork(tokens), tokens
        )
        self.tables.append(child)
        self.read(child)
        return child

    @rule(sequence=consumes(live))
    def go(self, sequence):
        partly = sequence.known % SIZE and self.pool.references(sequence.table[sequence.known // SIZE]) == 1
        if partly:
            self.texts.setdefault(sequence.salt, []).append(tuple(sequence.tokens[: sequence.known]))
        sequence.path.leave(sequence.tokens, sequence.known, sequence.table)
        sequence.table.release()
        self.tables.remove(sequence)

    @rule(target=live, sequence=consumes(live))
    def be_preempted(self, sequence):
        """Gives its blocks up, and starts again from what is left of them."""
        self.go(sequence)
        return self.come(sequence.salt, sequence.tokens) if sequence.tokens else multiple()

    @rule(count=st.integers(1, 10))
    def evict(self, count):
        free, available = self.pool.num_free, self.pool.num_available
        evicted = self.cache.evict(count)
        assert evicted == min(count, available - free)
        assert self.pool.num_free == free + evicted

    def read(self, sequence):
        """What attention would read is the KV of the sequence's own tokens."""
        for position in range(sequence.known):
            texts = self.contents[sequence.table[position // SIZE]]
            assert texts[position % SIZE] == tuple(sequence.tokens[: position + 1])

    @invariant()
    def books_agree(self):
        if not hasattr(self, "pool"):
            return
        self.count_step()
        held = list(self.cache.check())
        self.pool.check([*(s.table.ids for s in self.tables), held])
        assert len(held) == len(set(held)) <= self.pool.num_blocks
        for sequence in self.tables:
            assert set(sequence.table.ids[: sequence.path.num_blocks]) <= set(held), "what it shares is the cache's"
        by_table = {block for s in self.tables for block in s.table.ids}
        assert self.pool.num_idle >= len(set(held) - by_table) - self.cache.num_reserved

    def teardown(self):
        for sequence in list(getattr(self, "tables", ())):
            self.read(sequence)
            self.go(sequence)
            self.books_agree()


def test_any_order_of_sequences_that_come_grow_fork_and_go():
    run_machine(CacheMachine, length=60)
