"""A model made of a hash, for tests of the scheduler: it computes nothing, but it reads what paged attention reads.

The "KV" of a token is the whole text up to it, as a real one depends on it, and the KV group that it is of. The next
token is a hash of the sequence's stream and of its text, read back from the blocks, and what attention would see is
compared with that text: so a lost copy, a block with two owners, a block that was computed after other tokens or is
gone too early, or a wrong table is found.
"""

from collections.abc import Iterable, Sequence

from kvarn.draft_tree import chain, path
from kvarn.step import BlockLoad, DraftTokens, SampledToken, ScheduledSequence, SchedulerOutput, StepOutput

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


Kv = tuple[int, tuple[int, ...]]
"""KV group and text."""


class PagedModel:
    """Executes steps over real block tables, and checks what a runner may rely on."""

    def guess(self, token_ids: list[int], stream: int, most: int) -> tuple[int, ...]:
        """A draft of what follows these tokens. Tests put something else here."""
        return ()

    def guess_tree(self, token_ids: list[int], stream: int, part: ScheduledSequence) -> tuple[list[int], list[int]]:
        """The same as tokens and parents. Tests put something else here, or in `guess`."""
        draft = self.guess(token_ids, stream, part.num_drafts_wanted)
        return draft, chain(len(draft))

    def __init__(
        self, num_blocks: int, block_size: int, *, max_tokens: int, max_seqs: int,
        windows: tuple[int | None, ...] = (None,),
    ) -> None:  # fmt: skip
        self.slots: list[list[Kv | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.block_size = block_size
        self.windows = windows
        self.max_tokens = max_tokens
        self.max_seqs = max_seqs
        self.streams: dict[int, int] = {}
        self.tier: dict[int, tuple[bytes, list[Kv | None]]] = {}
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
            assert len(part.block_tables) == len(self.windows)
            for group, table in enumerate(part.block_tables):
                slots = [self._slot(table, position) for position in range(part.start, part.start + part.num_rows)]
                assert written.isdisjoint(slots), "two sequences write one slot"
                written.update(slots)
                for (block, offset), text in zip(slots, self._written(part, group, table), strict=True):
                    self.slots[block][offset] = group, text
        sampled, drafts = [], []
        for part in step.sequences:
            if not part.sample:
                continue
            known, stream = self._read(part, part.end), self.streams[part.sequence_id]
            assert known[-len(part.token_ids) :] == list(part.token_ids)
            places = self._verify(part, known, stream)
            sampled += [SampledToken(part.sequence_id, token) for token in known[part.end :]]
            self._move(part, places)
            assert self._read(part, part.end + len(places)) == known[:-1]
            draft, parents = self.guess_tree(known, stream, part)
            if draft:
                drafts.append(DraftTokens(part.sequence_id, tuple(draft), tuple(parents)))
        return StepOutput(step.step, tuple(sampled), loaded, drafts=tuple(drafts))

    def _written(self, part: ScheduledSequence, group: int, table: Sequence[int]) -> list[tuple[int, ...]]:
        """The text up to each of the part's rows. A guess of a tree follows its parent, wherever that is."""
        texts = [self._text(group, table, part.start)]
        for token in part.token_ids:
            texts.append((*texts[-1], token))
        first = len(texts)
        for token, parent in zip(part.draft, part.parents, strict=True):
            texts.append((*texts[first + parent], token))
        return texts[1:]

    def _verify(self, part: ScheduledSequence, known: list[int], stream: int) -> list[int]:
        """Says what comes, along the draft and one token beyond; returns which guesses were right."""
        while True:
            known.append(next_token(known, stream))
            places = path(part.draft, part.parents, known[part.end :])
            if len(places) < len(known) - part.end:
                return places

    def _move(self, part: ScheduledSequence, places: list[int]) -> None:
        for table in part.block_tables:
            for level, place in enumerate(places):
                block, offset = self._slot(table, part.end + level)
                source, there = self._slot(table, part.end + place)
                self.slots[block][offset] = self.slots[source][there]

    def _load(self, load: BlockLoad) -> int:
        for count, (block, slot, name) in enumerate(zip(load.blocks, load.slots, load.names, strict=True)):
            kept, content = self.tier.get(slot, (None, []))
            if kept != name:
                return count
            self.slots[block] = list(content)
        return len(load.blocks)

    def _slot(self, table: Sequence[int], position: int) -> tuple[int, int]:
        block = table[position // self.block_size]
        assert block >= 0, "a token's block is gone"
        return block, position % self.block_size

    def _text(self, group: int, table: Sequence[int], length: int) -> tuple[int, ...]:
        """What was written for the token before that position."""
        if length == 0:
            return ()
        block, offset = self._slot(table, length - 1)
        kv = self.slots[block][offset]
        assert kv is not None, "attention reads a slot that nobody wrote"
        assert kv[0] == group, "attention reads KV of another group's layers"
        assert len(kv[1]) == length, "attention reads KV of another position"
        return kv[1]

    def _read(self, part: ScheduledSequence, end: int) -> list[int]:
        """The tokens up to `end`, as they are in all groups."""
        texts = set()
        for group, (table, window) in enumerate(zip(part.block_tables, self.windows, strict=True)):
            text = self._text(group, table, end)
            texts.add(text)
            for position in range(0 if window is None else max(0, part.start - window + 1), end):
                assert self._text(group, table, position + 1) == text[: position + 1], "reads KV of another text"
        (text,) = texts
        return list(text)
