"""Logits of models on the reference back-end, and how near they must be to the oracle's."""

import numpy as np

from kvarn.backends import InputBatch, KvCacheSpec, StepLimits
from kvarn.backends.reference import ReferenceBackend
from kvarn.models import load_model
from kvarn.weights import open_model

BLOCK = 16
LIMIT = 256


def executable_of(model):
    return ReferenceBackend().load(
        model.program, model.weights, KvCacheSpec(32 * len(model.program.kv_groups), BLOCK, "float32"),
        StepLimits(LIMIT, 8, LIMIT),
    )


def load(path, **options):
    """An executable of the model in files; the files stay open."""
    return executable_of(load_model(open_model(path), **options))


def step(executable, spans, tables):
    """Runs one step of several sequences: spans of (token ids, position of the first); logits of all rows."""
    counts = [len(ids) for ids, _ in spans]
    positions = np.concatenate([np.arange(start, start + len(ids)) for ids, start in spans]).astype(np.int32)
    table = np.asarray(tables, dtype=np.int32)
    batch = InputBatch.of_tables(
        token_ids=np.concatenate([ids for ids, _ in spans]).astype(np.int32),
        positions=positions,
        query_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        seq_lens=np.array([start + len(ids) for ids, start in spans], dtype=np.int32),
        tables=table,
        output_rows=np.arange(sum(counts), dtype=np.int32),
        block_size=BLOCK,
        num_groups=len(executable.program.kv_groups),
    )
    return executable.execute(batch)["logits"].copy()


def whole(executable, ids):
    """Logits of one sequence in one step."""
    return step(executable, [(ids, 0)], [range(-(-len(ids) // BLOCK))])


def sample_ids(count, seed, vocab=97):
    return np.random.default_rng(seed).integers(0, vocab, count)


def assert_close(got, want):
    """Equal within float32 error: both sides round every op, which over these few layers makes up to 2e-5 of the
    largest logit."""
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
