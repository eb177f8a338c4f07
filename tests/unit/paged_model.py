"""A model made of a hash, for tests of the scheduler: it computes nothing, but it reads what paged attention reads.

The "KV" of a token is the whole text up to it, as a real one depends on it, and the KV group that it is of. The next
token is a hash of the sequence's stream and of its text, read back from the blocks, and what attention would see is
compared with that text: so a lost copy, a block with two owners, a block that was computed after other tokens or is
gone too early, or a wrong table is found.
"""

from __future__ import annotations

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


class Text:
    """A text: the one before its last token, and that token. Of each text there is one object, made by `then`."""

    __slots__ = ("_longer", "before", "length", "token")

    def __init__(self, before: Text | None = None, token: int = -1) -> None:
        self.before, self.token = before, token
        self.length: int = 0 if before is None else before.length + 1
        self._longer: dict[int, Text] = {}

    def then(self, token: int) -> Text:
        if token not in self._longer:
            self._longer[token] = Text(self, token)
        return self._longer[token]

    def token_ids(self) -> list[int]:
        tokens, text = [], self
        while text.before is not None:
            tokens.append(text.token)
            text = text.before
        return tokens[::-1]


Kv = tuple[int, Text]
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
        self.nothing = Text()
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
            if places:
                self._move(part, places)
                assert self._read(part, part.end + len(places)) == known[:-1]
            draft, parents = self.guess_tree(known, stream, part)
            if draft:
                drafts.append(DraftTokens(part.sequence_id, tuple(draft), tuple(parents)))
        return StepOutput(step.step, tuple(sampled), loaded, drafts=tuple(drafts))

    def _written(self, part: ScheduledSequence, group: int, table: Sequence[int]) -> list[Text]:
        """The text up to each of the part's rows. A guess of a tree follows its parent, wherever that is."""
        texts = [self._text(group, table, part.start)]
        for token in part.token_ids:
            texts.append(texts[-1].then(token))
        first = len(texts)
        for token, parent in zip(part.draft, part.parents, strict=True):
            texts.append(texts[first + parent].then(token))
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

    def _text(self, group: int, table: Sequence[int], length: int) -> Text:
        """What was written for the token before that position."""
        if length == 0:
            return self.nothing
        block, offset = self._slot(table, length - 1)
        kv = self.slots[block][offset]
        assert kv is not None, "attention reads a slot that nobody wrote"
        assert kv[0] == group, "attention reads KV of another group's layers"
        assert kv[1].length == length, "attention reads KV of another position"
        return kv[1]

    def _read(self, part: ScheduledSequence, end: int) -> list[int]:
        """The tokens up to `end`, as they are in all groups."""
        texts = set()
        for group, (table, window) in enumerate(zip(part.block_tables, self.windows, strict=True)):
            text = self._text(group, table, end)
            texts.add(text)
            for length in range(end, 0 if window is None else max(0, part.start - window + 1), -1):
                assert self._text(group, table, length) is text, "reads KV of another text"
                text = text.before
        (text,) = texts
        return text.token_ids()
