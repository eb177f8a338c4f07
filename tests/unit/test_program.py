"""`Program`: shape rules that refuse a wrong one, counts, and its listing."""

import dataclasses
import re

import pytest

from kvarn.kv_types import KV_TYPES
from kvarn.program import (
    Activation,
    Add,
    Attention,
    Buffer,
    Embed,
    GatedActivation,
    KvLayer,
    KvWrite,
    Linear,
    Logits,
    Norm,
    PositionEmbed,
    Program,
    Rope,
    RopeTable,
    Rows,
    SelectRows,
    Weight,
)
from kvarn.program.listing import listing
from kvarn.program.program import buffers_read, weights_read
from kvarn.program.shapes import ProgramError

TABLE = RopeTable((1.0, 0.1), "halves")
T, R = Rows.TOKENS, Rows.OUTPUTS
PARTS = {
    "ops": (
        Embed("x", "embed"),
        PositionEmbed("x", "x", "positions"),
        Norm("h", "x", "norm", "norm_bias", 1e-5, "layer"),
        Linear("q", "h", "wq", "bq"),
        Linear("k", "h", "wk"),
        Linear("v", "h", "wk"),
        Norm("q", "q", "head_norm", None, 1e-6, "rms", 4),
        Rope("q", "q", 4, 4, TABLE),
        Rope("k", "k", 2, 4, TABLE),
        KvWrite(0, "k", "v"),
        Attention(0, "q", "q", 4, 2, 4, 0.5),
        Add("x", "x", "q"),
        Linear("gate", "x", "up"),
        Activation("gate", "gate", "silu"),
        GatedActivation("gate", "gate", "gate", "relu"),
        SelectRows("last", "x"),
        Logits("logits", "last", "embed"),
    ),
    "buffers": (
        Buffer("x", T, 16), Buffer("h", T, 16), Buffer("q", T, 16), Buffer("k", T, 8), Buffer("v", T, 8),
        Buffer("gate", T, 24), Buffer("last", R, 16), Buffer("logits", R, 50),
    ),
    "weights": (
        Weight("embed", (50, 16)), Weight("positions", (32, 16)), Weight("norm", (16,)), Weight("norm_bias", (16,)),
        Weight("head_norm", (4,)), Weight("wq", (16, 16)), Weight("bq", (16,)), Weight("wk", (8, 16)),
        Weight("up", (24, 16)),
    ),
    "kv_layers": (KvLayer(2, 4, 4),),
}  # fmt: skip


def make(**changes) -> Program:
    return Program("example", **{**PARTS, "vocab_size": 50, "max_positions": 32, **changes})


def replaced(index, **changes):
    """The ops with fields of one of them changed."""
    ops = list(PARTS["ops"])
    ops[index] = dataclasses.replace(ops[index], **changes)
    return tuple(ops)


def without(kind, name):
    return tuple(item for item in PARTS[kind] if item.name != name)


def test_a_sound_program_is_accepted_and_counted():
    program = make()
    assert program.num_parameters == 50 * 16 + 32 * 16 + 3 * 16 + 4 + 16 * 16 + 8 * 16 + 24 * 16
    assert program.kv_bytes_per_token(KV_TYPES["float16"]) == 2 * (8 + 8)
    assert program.kv_bytes_per_token(KV_TYPES["int8"]) == 2 * (4 + 4 + 4 + 4)
    assert program.kv_bytes_per_token(KV_TYPES["int4"]) == 2 * (16 + 4 + 4 + 16 + 4)
    assert program.buffer("gate").width == 24
    assert program.weight("wk").shape == (8, 16)
    assert [op.weight for op in program.ops_of_kind("linear")] == ["wq", "wk", "wk", "up"]
    with pytest.raises(KeyError):
        program.buffer("nothing")
    with pytest.raises(KeyError):
        program.weight("nothing")


def test_what_an_op_reads():
    norm, write, attention, add = (PARTS["ops"][i] for i in (2, 9, 10, 11))
    assert (buffers_read(norm), weights_read(norm)) == (("x",), ("norm", "norm_bias"))
    assert buffers_read(write) == ("k", "v")
    assert buffers_read(attention) == ("q",)
    assert buffers_read(add) == ("x", "q")
    assert weights_read(PARTS["ops"][4]) == ("wk",)


def test_programs_are_values():
    assert make() == make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().name = "other"


BROKEN = {
    "two buffers of one name": ({"buffers": (*PARTS["buffers"], Buffer("x", T, 16))}, "share a name"),
    "two weights of one name": ({"weights": (*PARTS["weights"], Weight("up", (24, 16)))}, "share a name"),
    "no such buffer": ({"buffers": without("buffers", "gate")}, "no buffer 'gate'"),
    "no such weight": ({"weights": without("weights", "bq")}, "no weight 'bq'"),
    "a weight that nothing reads": ({"weights": (*PARTS["weights"], Weight("spare", (1,)))}, "no op reads"),
    "read before written": ({"ops": PARTS["ops"][1:]}, "before anything wrote"),
    "no output": ({"output": "probabilities"}, "no op writes the output"),
    "vocabulary of another size": ({"vocab_size": 51}, "table must be (vocab, width)"),
    "positions of another width": (
        {"weights": (*without("weights", "positions"), Weight("positions", (32, 8)))},
        "table must be (positions, width)",
    ),
    "norm weight of another width": ({"ops": replaced(2, weight="head_norm")}, "weight must have width / groups"),
    "bias of another width": ({"ops": replaced(2, bias="head_norm")}, "bias must match"),
    "groups that do not divide": ({"ops": replaced(6, groups=3)}, "divide into groups"),
    "linear of another input": ({"ops": replaced(12, x="k")}, "(out width, x width)"),
    "linear of another output": ({"ops": replaced(3, weight="wk")}, "(out width, x width)"),
    "linear bias of another width": ({"ops": replaced(4, bias="bq")}, "bias must have out width"),
    "rope of other heads": ({"ops": replaced(7, heads=2)}, "heads * head_dim"),
    "rope of more than a head": ({"ops": replaced(7, heads=8, head_dim=2)}, "rotary_dim must be at most"),
    "no such KV layer": ({"ops": replaced(9, layer=1)}, "no such KV layer"),
    "keys of another width": ({"ops": replaced(9, k="q")}, "k must be"),
    "values of another width": ({"ops": replaced(9, v="q")}, "v must be"),
    "attention of no layer": ({"ops": replaced(10, layer=-1)}, "no such KV layer"),
    "attention of other KV heads": ({"ops": replaced(10, kv_heads=4)}, "KV layer must match"),
    "attention of another window": ({"ops": replaced(10, window=8)}, "window must match"),
    "attention of heads that do not divide": ({"ops": replaced(10, heads=3)}, "multiple of kv_heads"),
    "attention of other heads": ({"ops": replaced(10, heads=2)}, "q must be"),
    "activation of another width": ({"ops": replaced(13, x="x")}, "widths must agree"),
    "gated activation of another width": ({"ops": replaced(14, up="x")}, "widths must agree"),
    "sum of other widths": ({"ops": replaced(11, b="k")}, "widths must agree"),
    "selection into token rows": (
        {"buffers": (*without("buffers", "last"), Buffer("last", T, 16))},
        "token rows into output rows",
    ),
    "logits of token rows": ({"ops": replaced(16, x="x")}, "rows must agree"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_program_that_breaks_a_rule_is_refused(what):
    changes, rule = BROKEN[what]
    with pytest.raises(ProgramError, match=re.escape(rule)):
        make(**changes)


def test_the_listing_names_shapes_and_attributes():
    lines = listing(make()).splitlines()
    assert len(lines) == len(PARTS["ops"])
    assert " ".join(lines[0].split()) == "embed x[T, 16] <- embed[50, 16] (scale=1)"
    assert "wq[16, 16], bq[16]" in lines[3]
    assert "halves, 4 of the head rotated" in lines[7]
    assert " ".join(lines[9].split()) == "kv_write kv[0] <- k, v"
    assert "kv[0]" in lines[10] and "kv_heads=2" in lines[10]
    assert lines[16].startswith("logits") and "logits[R, 50]" in lines[16]
