"""A model made of a hash, for tests of the scheduler: it computes nothing, but it reads what paged attention reads.

The "KV" of a token is the token and a hash of those before it, as a real one depends on them. The next token is a hash
of the sequence's stream and of all its tokens, read back from the blocks, so a lost copy, a block with two owners, a
block that was computed after other tokens or a wrong table is found.
"""

from collections.abc import Iterable, Sequence

from kvarn.step import BlockLoad, DraftTokens, SampledToken, SchedulerOutput, StepOutput

VOCAB = 50


def next_token(token_ids: Iterable[int], stream: int) -> int:
    return hash((*token_ids, stream)) % VOCAB


def expected_tokens(
    prompt: Sequence[int], stream: int, *, max_length: int, ends: frozenset[int] = frozenset(), min_tokens: int = 0
) -> list[int]:
    """What a sequence says when it is alone."""
    tokens = list(prompt)
    while len(tokens) < max_length:
        tokens.append(next_token(tokens, stream))
        if tokens[-1] in ends and len(tokens) - len(prompt) > min_tokens:
            break
    return tokens[len(prompt) :]


class PagedModel:
    """Executes steps over real block tables, and checks what a runner may rely on."""

    def guess(self, token_ids: list[int], stream: int, most: int) -> tuple[int, ...]:
        """A draft of what follows these tokens. Tests put something else here."""
        return ()

    def __init__(self, num_blocks: int, block_size: int, *, max_tokens: int, max_seqs: int) -> None:
        self.slots: list[list[tuple[int, int] | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.block_size = block_size
        self.max_tokens = max_tokens
        self.max_seqs = max_seqs
        self.streams: dict[int, int] = {}
        self.tier: dict[int, tuple[bytes, list[tuple[int, int] | None]]] = {}
        """By slot: name and content."""

    def execute(self, step: SchedulerOutput) -> StepOutput:
        for sequence_id in step.finished:
            del self.streams[sequence_id]
        for new in step.new:
            assert new.sequence_id not in self.streams, "announced twice"
            self.streams[new.sequence_id] = new.stream
        assert step.num_tokens <= self.max_tokens
        assert len(step.sequences) <= self.max_seqs
        assert len({s.sequence_id for s in step.sequences}) == len(step.sequences)
        for save in step.block_saves:
            self.tier[save.slot] = save.name, list(self.slots[save.block])
        for source, destination in step.block_copies:
            self.slots[destination] = list(self.slots[source])
        loaded = tuple(self._load(load) for load in step.block_loads)
        written: set[tuple[int, int]] = set()
        for part in step.sequences:
            assert part.token_ids, "scheduled with nothing to compute"
            assert part.sample or not part.draft
            for position, token in enumerate(part.token_ids + part.draft, part.start):
                block, offset = self._slot(part.block_table, position)
                assert (block, offset) not in written, "two sequences write one slot"
                written.add((block, offset))
                self.slots[block][offset] = token, self._history(part.block_table, position)
        sampled, drafts = [], []
        for part in step.sequences:
            if not part.sample:
                continue
            known, stream = self._read(part), self.streams[part.sequence_id]
            for guess in (*part.draft, None):
                known.append(next_token(known, stream))
                sampled.append(SampledToken(part.sequence_id, known[-1]))
                if known[-1] != guess:
                    break
            draft = self.guess(known, stream, part.num_drafts_wanted)
            if draft:
                drafts.append(DraftTokens(part.sequence_id, draft))
        return StepOutput(
            step.step, tuple(sampled), loaded, drafts=tuple(drafts)
        )

    def _load(self, load: BlockLoad) -> int:
        for count, (block, slot, name) in enumerate(zip(load.blocks, load.slots, load.names, strict=True)):
            kept, content = self.tier.get(slot, (None, []))
            if kept != name:
                return count
            self.slots[block] = list(content)
        return len(load.blocks)

    def _slot(self, table: Sequence[int], position: int) -> tuple[int, int]:
        return table[position // self.block_size], position % self.block_size

    def _history(self, table: Sequence[int], position: int) -> int:
        """A hash of the tokens before that position."""
        if position == 0:
            return 0
        block, offset = self._slot(table, position - 1)
        return hash(self.slots[block][offset])

    def _read(self, part) -> list[int]:
        """The known tokens. Also looks at what was written for the draft."""
        tokens = []
        for position in range(part.end + len(part.draft)):
            block, offset = self._slot(part.block_table, position)
            kv = self.slots[block][offset]
            assert kv is not None, "attention reads a slot that nobody wrote"
            assert kv[1] == self._history(part.block_table, position), "attention reads KV of another text"
            tokens.append(kv[0])
        return tokens[: part.end]
