"""The reference back-end as an executable: paged cache, outputs by name, copies of blocks, when weights are read."""

import dataclasses

import numpy as np
import pytest
from op_programs import groups_of, ragged

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.reference import ReferenceBackend
from kvarn.errors import ConfigError
from kvarn.tensors import DType, Tensor
from kvarn.tensors.dequantize import dequantize
from kvarn.testing import tiny_model

IDS = [int(i) for i in np.random.default_rng(5).integers(0, 256, 40)]
FAMILIES = ["llama", "gemma3_text", "gpt2"]


def load(model, blocks=16, block_size=8, dtype="float32", limit=128):
    spec = KvCacheSpec(blocks * groups_of(model), block_size, dtype)
    return ReferenceBackend().load(model.program, model, spec, StepLimits(64, 8, limit))


def run(executable, parts, tables, outputs=None):
    size = executable.kv.block_size
    batch = ragged(parts, tables=tables, outputs=outputs, block_size=size, num_groups=groups_of(executable))
    return executable.execute(batch)["logits"]


def assert_same(got, want):
    """Equal up to the roundings of matrix products whose number of rows differs."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_reads_its_own_context_only(family):
    """Blocks hold another sequence's remains, not even numbers, and a neighbour writes its own in the same step."""
    model = tiny_model(family)
    alone = run(load(model), [(IDS, 0)], [[0, 1, 2, 3, 4]])
    name = next(op.weight for op in model.program.ops if op.kind == "embed")
    table = dequantize(model.tensor(name)).copy()
    table[258] = np.nan
    poisoned = dataclasses.replace(model, tensors={**model.tensors, name: Tensor.from_array(table)})
    executable = load(poisoned)
    remains = run(executable, [([258] * 40, 0)], [[3, 9, 1, 0, 7]])
    assert np.isnan(remains).all()
    crowd = [(IDS, 0), ([258] * 9, 0)]
    crowded = run(executable, crowd, [[3, 9, 1, 0, 7], [2, 4]])[:40]
    assert_same(crowded[:, :258], alone[:, :258])  # of a tied model the logit of the spoilt token is spoilt too


@pytest.mark.parametrize("family", FAMILIES)
def test_pages_and_chunks_do_not_matter(family):
    model = tiny_model(family)
    whole = run(load(model, block_size=64, blocks=1), [(IDS, 0)], [[0]])
    for size, table in ((1, list(range(39, -1, -1))), (3, [13, 0, 5, 2, 9, 4, 11, 1, 12, 3, 10, 6, 8, 7])):
        executable = load(model, block_size=size, blocks=40)
        parts = [run(executable, [(IDS[a:b], a)], [table]) for a, b in ((0, 1), (1, 17), (17, 18), (18, 40))]
        assert_same(np.concatenate(parts), whole)


def test_copied_blocks_carry_a_sequence_on():
    model = tiny_model("mistral")
    executable = load(model)
    run(executable, [(IDS[:30], 0)], [[0, 1, 2, 3]])
    want = run(executable, [(IDS[30:32], 30)], [[0, 1, 2, 3]]).copy()
    executable = load(model)
    run(executable, [(IDS[:30], 0)], [[0, 1, 2, 3]])
    executable.copy_blocks([(0, 10), (3, 5), (5, 13), (1, 0)])  # in order: block 13 is what block 3 was
    np.testing.assert_array_equal(run(executable, [(IDS[30:32], 30)], [[10, 0, 2, 13]]), want)


def test_any_buffer_can_be_asked_for():
    model = tiny_model("llama")
    executable = load(model)
    batch = ragged([(IDS[:10], 0)], outputs=[9], block_size=8)
    out = executable.execute(batch, ["x", "attn", "last"])
    assert {name: a.shape for name, a in out.items()} == {
        "logits": (1, 259), "x": (10, 64), "attn": (10, 64), "last": (1, 64),
    }  # fmt: skip
    head = dequantize(model.tensor("lm_head.weight"))
    np.testing.assert_allclose(out["logits"], out["last"] @ head.T, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no buffer 'z'"):
        executable.execute(batch, ["z"])


def test_a_step_may_need_no_logits():
    executable = load(tiny_model("qwen3"))
    assert run(executable, [(IDS[:20], 0)], [[0, 1, 2]], outputs=[]).shape == (0, 259)
    want = run(load(tiny_model("qwen3")), [(IDS[:21], 0)], [[0, 1, 2]], outputs=[20])
    assert_same(run(executable, [(IDS[20:21], 20)], [[0, 1, 2]]), want)


@dataclasses.dataclass
class Counting:
    """A source that notes what is read."""

    model: object
    read: list[str] = dataclasses.field(default_factory=list)

    def tensor(self, name):
        self.read.append(name)
        return self.model.tensor(name)

    def release(self):
        self.model.release()


def test_weights_are_read_when_first_used_and_kept():
    model = tiny_model("llama", dtype=DType.Q8_0)
    source = Counting(model)
    executable = ReferenceBackend().load(model.program, source, KvCacheSpec(4, 16), StepLimits(32, 1, 64))
    assert source.read == []
    for start in (0, 1):
        executable.execute(ragged([(IDS[start : start + 1], start)]))
    counts = {name: source.read.count(name) for name in set(source.read)}
    assert counts.pop("embed.weight") == 2  # the rows of each step, not the table
    assert set(counts.values()) == {1}
    assert set(counts) == {weight.name for weight in model.program.weights} - {"embed.weight"}


def test_more_tokens_than_learned_positions_are_refused_at_load():
    model = tiny_model("gpt2", n_positions=64)
    load(model, limit=64)
    with pytest.raises(ConfigError, match="max_model_len must be at most 64"):
        load(model, limit=65)


def test_closing_twice_is_no_error():
    executable = load(tiny_model("llama"))
    executable.close()
    executable.close()
