"""Programs over rows that the caller gives, beside another program."""

import dataclasses

import numpy as np
import pytest
from op_programs import OpProgram

from kvarn.backends import InputBatch, KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend
from kvarn.backends.null import NullBackend
from kvarn.backends.reference import ReferenceBackend
from kvarn.program import Activation, Add, Buffer, Embed, Input, Linear, Program, Rows
from kvarn.program.shapes import ProgramError
from kvarn.tensors import DType
from kvarn.testing import random_tensor, tiny_model

WIDTH, OUT = 64, 48
KV = KvCacheSpec(2, 16, "float32")
LIMITS = StepLimits(12, 1, 32, 11, outputs=("h",))
BACKENDS = {"cpu": lambda: CpuBackend(threads=2), "reference": ReferenceBackend}


def program(stored=DType.F32, *, given=True, rows=None):
    """silu(W x) + x, then another linear; x is the caller's, or the rows of a table."""
    p, rng = OpProgram(32), np.random.default_rng(1)
    if given:
        p.buffer("x", WIDTH)
        p.add(Input("x"))
    else:
        p.input("x", rows)
    p.weight("w", random_tensor(rng, stored, (WIDTH, WIDTH), 0.2))
    p.weight("u", random_tensor(rng, stored, (OUT, WIDTH), 0.2))
    p.add(Linear(p.buffer("h", WIDTH), "x", "w"))
    p.add(Activation("h", "h", "silu"))
    p.add(Add("h", "h", "x"))
    p.add(Linear(p.buffer("y", OUT), "h", "u"))
    return p


def rows_of(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def batch(count, **inputs):
    return dataclasses.replace(InputBatch.of_one(np.arange(count), num_outputs=count), inputs=inputs)


@pytest.mark.parametrize("stored", [DType.F32, DType.Q8_0], ids=lambda d: d.name)
@pytest.mark.parametrize("name", BACKENDS)
def test_given_rows_are_computed_as_those_of_a_table(name, stored):
    rows = rows_of(32)
    backend = BACKENDS[name]()
    ours, theirs = program(stored), program(stored, given=False, rows=rows)
    given = backend.load(ours.program("y"), ours, KV, LIMITS)
    looked_up = backend.load(theirs.program("y"), theirs, KV, LIMITS)
    for count in (12, 1, 5):
        got, want = given.execute(batch(count, x=rows[:count])), looked_up.execute(batch(count))
        assert got.keys() == {"y", "h"} == want.keys(), "outputs of the limits come unasked"
        for buffer in got:
            np.testing.assert_array_equal(got[buffer], want[buffer])
    given.close()
    looked_up.close()


@pytest.mark.parametrize("name", [*BACKENDS, "null"])
def test_rows_that_lack_or_do_not_fit_are_refused(name):
    backend = NullBackend() if name == "null" else BACKENDS[name]()
    p = program()
    executable = backend.load(p.program("y"), p, KV, LIMITS)
    for inputs, message in (
        ({}, "inputs must be"),
        ({"z": rows_of(3)}, "inputs must be"),
        ({"x": rows_of(3), "z": rows_of(3)}, "inputs must be"),
        ({"x": rows_of(4)}, "must have the shape"),
        ({"x": rows_of(3)[:, 1:]}, "must have the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            executable.execute(batch(3, **inputs))
    out = executable.execute(batch(3, x=rows_of(3)))
    assert out["h"].shape == (3, WIDTH)
    executable.close()


def test_the_caller_is_asked_first():
    x, y = (Buffer(name, Rows.TOKENS, 8) for name in "xy")
    weights = program().program("y").weights[:0]
    with pytest.raises(ProgramError, match="comes first"):
        Program("p", (Input("x"), Activation("y", "x", "silu"), Input("x")), (x, y), weights, (), 9, 9, "y")
    with pytest.raises(ProgramError, match="token rows"):
        Program("p", (Input("x"),), (Buffer("x", Rows.OUTPUTS, 8),), weights, (), 9, 9, "x")


def test_what_two_executables_share_is_held_once():
    """The same threads, the same table; bits and bytes are those of a table of its own."""
    model = tiny_model("llama", dtype=DType.Q8_0)
    spec, limits = KvCacheSpec(8, 16, "float16"), StepLimits(16, 2, 64, 14)
    backend = CpuBackend(threads=2)
    target = backend.load(model.program, model, spec, limits)
    p = OpProgram(model.program.vocab_size)
    p.weight("embed.weight", model.tensor("embed.weight"))
    p.weight("u", random_tensor(np.random.default_rng(1), DType.Q8_0, (OUT, WIDTH), 0.2))
    p.buffer("x", WIDTH)
    p.add(Embed("x", "embed.weight"))
    p.add(Linear(p.buffer("y", OUT), "x", "u"))
    small = p.program("y")
    dtypes = {name: tensor.dtype for name, tensor in p.tensors.items()}
    alone = backend.load(small, p, spec, limits)
    beside = backend.load(small, p, spec, limits, beside=target, shared={"embed.weight"})
    np.testing.assert_array_equal(beside.execute(batch(5))["y"], alone.execute(batch(5))["y"])
    said = backend.memory_use(small, dtypes, spec, limits, shared={"embed.weight"})
    assert beside.info().memory == said
    assert said.weights < backend.memory_use(small, dtypes, spec, limits).weights - 259 * WIDTH // 2
    target.close()
    np.testing.assert_array_equal(beside.execute(batch(5))["y"], alone.execute(batch(5))["y"])
    beside.close()
    alone.close()
