"""A draft model made of a hash, for tests: its KV is the whole text up to a token, in blocks under the target's ids."""

from types import SimpleNamespace

import numpy as np
from paged_model import VOCAB, PagedModel

from kvarn.backends import StepLimits
from kvarn.draft_tree import chain
from kvarn.spec.draft_model import DraftModelDrafter
from kvarn.spec.found_first import FoundFirst
from kvarn.spec.ngram import NgramDrafter
from kvarn.step import DraftTokens, StepOutput


class PagedDraft:
    """An executable that checks what its attention reads; its only logit is the number of the text it has read."""

    program = SimpleNamespace(output="logits", vocab_size=VOCAB)

    def __init__(self, num_blocks, block_size):
        self.slots = [[None] * block_size for _ in range(num_blocks)]
        self.block_size = block_size
        self.texts = []
        self.num_tokens = 0

    def copy_blocks(self, pairs):
        for source, destination in pairs:
            self.slots[destination] = list(self.slots[source])

    def execute(self, batch):
        self.texts = []
        self.num_tokens += batch.num_tokens
        outputs, written = set(batch.output_rows.tolist()), set()
        for sequence, table in enumerate(batch.block_tables[:, 0]):
            for row in range(*batch.query_start[sequence : sequence + 2]):
                position = int(batch.positions[row])
                before = self.read(table, position)
                block, offset = divmod(int(batch.slot_mapping[row, 0]), self.block_size)
                assert (block, offset) not in written, "two sequences write one slot"
                written.add((block, offset))
                self.slots[block][offset] = (*before, int(batch.token_ids[row]))
                if row in outputs:
                    self.texts.append(self.slots[block][offset])
        return {"logits": np.arange(len(self.texts), dtype=np.float32)[:, None]}

    def read(self, table, length):
        """The text of the tokens before a position; all of their KV is looked at."""
        text = ()
        for position in range(length):
            slot = self.slots[table[position // self.block_size]][position % self.block_size]
            assert slot is not None, "attention reads a slot that nobody wrote"
            assert slot[:-1] == text, "attention reads KV of another text"
            text = slot
        return text


class DraftedModel(PagedModel):
    """With a real drafter, which guesses by `guess` what follows the text that the draft model has read."""

    def __init__(self, num_blocks, block_size, *, max_tokens, max_seqs, windows=(None,), max_model_len=60, drafts=9):
        super().__init__(num_blocks, block_size, max_tokens=max_tokens, max_seqs=max_seqs, windows=windows)
        self.draft = PagedDraft(num_blocks, block_size)
        limits = StepLimits(max_seqs + 8, max_seqs, max_model_len)
        self.reader = DraftModelDrafter(
            self.draft, SimpleNamespace(guess=self.guesses), limits, num_blocks, block_size, VOCAB, drafts
        )
        self.drafter = self.reader

    def say(self, text, stream):
        """The draft model's next token. Tests put something else here."""
        return 0

    def guesses(self, logits, sequence_ids, positions, ahead, probabilities, rows):
        tokens = []
        for number, sequence_id, position, before in zip(logits[:, 0], sequence_ids, positions, ahead, strict=True):
            text = self.draft.texts[int(number)]
            known = tuple(self.reader._texts[sequence_id].tokens)
            assert text == (*known, *before), "guesses what follows another text"
            assert position == len(text)
            tokens.append(self.say(text, self.streams[sequence_id]))
        return tokens

    def execute(self, step):
        for sequence_id in step.finished:
            self.drafter.remove(sequence_id)
        for new in step.new:
            self.drafter.add(new)
        self.drafter.prepare(step)
        result = super().execute(step)
        if not step.sequences:
            return result
        proposals = self.drafter.propose(step, result.sampled, {})
        parts = {part.sequence_id: part for part in step.sequences}
        drafts = []
        for p in proposals:
            part, count = parts[p.sequence_id], len(p.token_ids)
            assert 0 < count <= (part.num_copies_wanted if p.copied else part.num_drafts_wanted)
            assert not p.copied or count >= part.least_copied
            drafts.append(DraftTokens(p.sequence_id, p.token_ids, chain(count), p.copied))
        assert len(drafts) == len({draft.sequence_id for draft in drafts}), "guesses of two sources"
        return StepOutput(step.step, result.sampled, result.loaded, drafts=tuple(drafts))


class Recall(NgramDrafter):
    """Finds what a test wants found, in place of what occurred before."""

    def __init__(self, recall):
        """recall: of a text and a number of tokens at most: what is found."""
        super().__init__(1, 1)
        self.recall = recall

    def _guess(self, sequence_id, count):
        text = self._texts[sequence_id]
        return self.recall(text.tokens, text.new.stream, count)


class TwiceDraftedModel(DraftedModel):
    """That looks up first, by `recall`."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.drafter = FoundFirst(Recall(lambda text, stream, most: self.recall(text, stream, most)), self.reader)

    def recall(self, text, stream, most):
        """What is found after a text. Tests put something else here."""
        return ()
