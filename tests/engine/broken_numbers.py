"""What no model should do, for tests: embeddings of NaN, and memory that goes bad."""

import numpy as np
from tiny_engine import Wrapper, shared_model

from kvarn.models.in_memory import InMemoryModel
from kvarn.runner.drafter import NullDrafter, Proposal
from kvarn.tensors import Tensor
from kvarn.tensors.dequantize import dequantize

BAD = 0
"""The token that the model has no numbers for."""


def poisoned_model(family="llama", seed=0):
    """A tiny model whose embedding of `BAD` is NaN. It may say that token; what would come after it is NaN, too."""
    model = shared_model(family, seed)
    table = np.array(dequantize(model.tensors["embed.weight"]), np.float32)
    table[BAD] = np.nan
    return InMemoryModel(model.config, model.program, {**model.tensors, "embed.weight": Tensor.from_array(table)})


class BadMemory(Wrapper):
    """An executable. As often as it is told to, the KV blocks of sequences that compute a `!` hold NaN from then on."""

    def __init__(self, inner, *, logits=False):
        """logits: theirs in that step are NaN, too; else only who reads the blocks later gets NaN."""
        super().__init__(inner)
        self.faults = 0
        self._logits = logits

    def execute(self, batch, outputs=()):
        values = self.inner.execute(batch, outputs)
        rows = np.flatnonzero(batch.token_ids == ord("!"))
        if not self.faults or not rows.size:
            return values
        self.faults -= 1
        logits = values["logits"].copy()
        for row in rows:
            sequence = int(np.searchsorted(batch.query_start, row, side="right")) - 1
            begin, end = batch.query_start[sequence : sequence + 2]
            slots = batch.slot_mapping[begin:end].reshape(-1)
            for block in np.unique(slots // self.block_size):
                self.inner.write_block(int(block), np.full(self.inner.block_bytes, 0xFF, np.uint8))
            if self._logits:
                logits[(batch.output_rows >= begin) & (batch.output_rows < end)] = np.nan
        return {**values, "logits": logits}

    block_size = 16


class Guesses(NullDrafter):
    """A drafter that always guesses the same: two tokens, each of which the second follows."""

    def __init__(self, *tokens):
        self._tokens = tokens

    def propose(self, scheduled, sampled, values):
        wanted = [part.sequence_id for part in scheduled.sequences if part.num_nodes_wanted >= 2 * len(self._tokens)]
        tree = tuple(token for token in self._tokens for _ in range(2))
        parents = tuple(place - 1 if place % 2 else -1 for place in range(len(tree)))
        return [Proposal(sequence_id, tree, parents=parents) for sequence_id in wanted]
