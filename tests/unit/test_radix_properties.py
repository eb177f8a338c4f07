"""The radix cache against the plainest one: a list of all texts, of which the longest common beginning counts."""

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import Bundle, consumes, initialize, invariant, multiple, rule
from state_machines import CountedMachine, run_machine

from kvarn.cache import HOLE, BlockPool, RadixPrefixCache, common_length, new_tables

pytestmark = pytest.mark.long

SIZE = 3
CHUNK = 20
"""Most tokens that a sequence computes at once."""
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
    windows: tuple[int | None, ...] = (None,)

    @initialize(blocks=st.integers(6, 40))
    def start(self, blocks):
        self.pool = BlockPool(blocks * len(self.windows), SIZE, self.windows)
        self.cache = RadixPrefixCache(self.pool, DECLARED)
        self.tables = []
        self.texts = {}
        """By salt: what has been computed. Of other salts only declared blocks count."""
        self.contents = {}
        """By block: the KV group and the text up to each token in it, as it was written."""
        self.evicted = 0

    def known_to(self, salt, tokens):
        """How many of `tokens`, but the last, a cache that forgets nothing has for this salt."""
        most = max((common_length(text, tokens) for text in self.texts.get(salt, ())), default=0)
        for text in (text for texts in self.texts.values() for text in texts):
            for prefix in DECLARED:
                whole = len(prefix) // SIZE * SIZE
                common = common_length(text, prefix[:whole]) // SIZE * SIZE
                most = max(most, common_length(prefix[:common], tokens))
        return min(most, len(tokens) - 1)

    def there(self, salt, tokens):
        """The longest beginning of `tokens`, but the last, that the tree has with all that the next token sees."""
        node, nodes, last = self.cache.root, [], len(tokens) - 1
        for end in range(SIZE, last + 1, SIZE):
            child = self.cache.find(node, salt, tuple(tokens[end - SIZE : end]))
            if child is None:
                break
            node = child
            nodes.append(node)
        inside, part = self.cache.nearest(node, salt, tuple(tokens[SIZE * len(nodes) : last][:SIZE]))
        longest = SIZE * len(nodes) + inside
        nodes.append(part)
        for length in range(longest, 0, -1):
            seen = [
                nodes[position // SIZE].blocks[group]
                for group, window in enumerate(self.windows)
                for position in range(0 if window is None else max(0, length - max(window, SIZE + 1) + 1), length)
            ]
            if HOLE not in seen:
                return length
        return 0

    @rule(target=live, salt=SALTS, tokens=TOKENS)
    def come(self, salt, tokens):
        table, path = new_tables(self.pool), self.cache.path(salt)
        expected = self.there(salt, tokens)
        available, order = self.pool.num_available, [*self.pool._idle, *self.pool._spare]
        hit = path.peek(tokens)
        assert [*self.pool._idle, *self.pool._spare] == order, "to look is not to use"
        known = path.adopt(tokens, table, 0)
        assert hit.num_tokens == known == expected
        taken = sum(known // SIZE - one.num_holes for one in table.by_group) - hit.num_held_blocks
        assert taken <= available - self.pool.num_available <= taken + (known % SIZE > 0) * len(self.windows)
        assert known <= self.known_to(salt, tokens)
        if not self.evicted:
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
        self.evicted += self.cache.evict(needed - self.pool.num_free)
        for source, copy in sequence.table.prepare_write(sequence.known, end):
            self.contents[copy] = list(self.contents[source])
        for position in range(sequence.known, end):
            for group, block in enumerate(sequence.table.column(position // SIZE)):
                texts = self.contents.setdefault(block, [None] * SIZE)
                texts[position % SIZE] = group, tuple(sequence.tokens[: position + 1])
        sequence.known = end
        sequence.path.insert(sequence.tokens, end, sequence.table)
        sequence.table.slide(end)
        self.texts.setdefault(sequence.salt, []).append(tuple(sequence.tokens[: end // SIZE * SIZE]))
        self.read(sequence)

    @rule(sequence=live)
    def go_on(self, sequence):
        """As a running sequence does before it computes a chunk."""
        end = len(sequence.tokens)
        before = self.pool.num_available - sequence.table.blocks_to_reach(sequence.known, end, CHUNK)
        if sequence.known < len(sequence.tokens) - 1:
            known = sequence.path.adopt(sequence.tokens, sequence.table, sequence.known, whole_blocks=True)
            assert known >= sequence.known
            sequence.known = known
            after = self.pool.num_available - sequence.table.blocks_to_reach(known, end, CHUNK)
            assert after >= before, "it needs no more blocks than without"
            self.read(sequence)

    @rule(target=live, sequence=live, tokens=st.integers(0, 14))
    def fork(self, sequence, tokens):
        tokens = min(tokens, sequence.known)
        if not sequence.table.sees(tokens):
            tokens = sequence.known
        child = Live(
            sequence.salt, sequence.tokens[:tokens], sequence.table.fork(tokens), sequence.path.fork(tokens), tokens
        )
        self.tables.append(child)
        self.read(child)
        return child

    @rule(sequence=consumes(live))
    def go(self, sequence):
        last = sequence.table.column(sequence.known // SIZE) if sequence.known % SIZE else []
        if last and all(self.pool.references(block) == 1 for block in last):
            self.texts.setdefault(sequence.salt, []).append(tuple(sequence.tokens[: sequence.known]))
        sequence.path.leave(sequence.tokens, sequence.known, sequence.table)
        sequence.table.release()
        self.tables.remove(sequence)

    @rule(target=live, sequence=consumes(live))
    def be_preempted(self, sequence):
        """Gives its blocks up, and starts again from what is left of them."""
        self.go(sequence)
        return self.come(sequence.salt, sequence.tokens) if sequence.tokens else multiple()

    @rule(sequence=consumes(live))
    def be_disowned(self, sequence):
        """Its KV is not to be believed: of its beginning the tree has no more than what somebody holds."""
        sequence.path.disown(sequence.tokens, sequence.table)
        self.tables.remove(sequence)
        self.evicted += 1
        nodes, node = [], self.cache.root
        for start in range(0, sequence.known, SIZE):
            tokens = tuple(sequence.tokens[start : start + SIZE])
            node = self.cache.find(node, sequence.salt, tokens) or self.cache.nearest(node, sequence.salt, tokens)[1]
            if node is None:
                break
            nodes.append(node)
        held = [any(self.pool.references(block) > 1 for block in node.present) for node in nodes]
        behind = nodes[len(held) - held[::-1].index(True) :] if any(held) else nodes
        assert not any(node.present for node in behind)

    @rule(count=st.integers(1, 10))
    def evict(self, count):
        free, available = self.pool.num_free, self.pool.num_available
        evicted = self.cache.evict(count)
        self.evicted += evicted
        assert min(count, available - free) <= evicted < count + len(self.windows)
        assert self.pool.num_free == free + evicted

    def read(self, sequence):
        """What attention would read is the KV of the sequence's own tokens."""
        for group, (table, window) in enumerate(zip(sequence.table.by_group, self.windows, strict=True)):
            for position in range(0 if window is None else max(0, sequence.known - window + 1), sequence.known):
                texts = self.contents[table[position // SIZE]]
                assert texts[position % SIZE] == (group, tuple(sequence.tokens[: position + 1]))

    @invariant()
    def books_agree(self):
        if not hasattr(self, "pool"):
            return
        self.count_step()
        held = list(self.cache.check())
        self.pool.check([*(s.table.held for s in self.tables), held])
        assert len(held) == len(set(held)) <= self.pool.num_blocks
        for sequence in self.tables:
            shared = {block for table in sequence.table.ids for block in table[: sequence.path.num_blocks]}
            assert shared - {HOLE} <= set(held), "what it shares is the cache's"
        by_table = {block for s in self.tables for block in s.table.held}
        assert self.pool.num_idle >= len(set(held) - by_table) - self.cache.num_reserved

    def teardown(self):
        for sequence in list(getattr(self, "tables", ())):
            self.read(sequence)
            self.go(sequence)
            self.books_agree()


class WithWindows(CacheMachine):
    """Groups that keep all, a window, and a window of less than a block."""

    windows = (None, 7, 2)


class WithWindowsOnly(CacheMachine):
    """No group keeps all, so that texts lose their middle."""

    windows = (5, 8)


@pytest.mark.parametrize("machine", [CacheMachine, WithWindows, WithWindowsOnly])
def test_any_order_of_sequences_that_come_grow_fork_and_go(machine):
    run_machine(machine, length=60)
