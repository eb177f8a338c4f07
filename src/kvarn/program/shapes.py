"""Shape rules: what must hold between an op's buffers, weights and attributes. `validate` checks a whole program."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from kvarn.program import ops
from kvarn.program.buffers import Buffer, Rows, Weight

if TYPE_CHECKING:
    from kvarn.program.program import Program


class ProgramError(ValueError):
    """A program breaks a shape rule: a mistake in a family's file, never of a user's."""


def _require(ok: bool, op: object, rule: str) -> None:
    if not ok:
        raise ProgramError(f"{op}: {rule}")


def validate(program: Program) -> None:
    """Raises ProgramError where names are missing or doubled, widths disagree, or a buffer is read before written."""
    buffers = {b.name: b for b in program.buffers}
    weights = {w.name: w for w in program.weights}
    if len(buffers) != len(program.buffers) or len(weights) != len(program.weights):
        raise ProgramError("two buffers or two weights share a name")
    from kvarn.program.program import buffers_read, weights_read

    written: set[str] = set()
    used: set[str] = set()
    for before, op in zip((None, *program.ops), program.ops, strict=False):
        _require(not isinstance(op, ops.Input) or before is None or isinstance(before, ops.Input), op, "comes first")
        for name in buffers_read(op):
            _require(name in buffers, op, f"no buffer {name!r}")
            _require(name in written, op, f"reads {name!r} before anything wrote it")
        for name in weights_read(op):
            _require(name in weights, op, f"no weight {name!r}")
            used.add(name)
        if not isinstance(op, ops.KvWrite):
            _require(op.out in buffers, op, f"no buffer {op.out!r}")
            written.add(op.out)
        _check_op(program, op, buffers, weights)
    if unused := set(weights) - used:
        raise ProgramError(f"weights that no op reads: {sorted(unused)}")
    if program.output not in written:
        raise ProgramError(f"no op writes the output {program.output!r}")


def _check_op(program: Program, op: ops.Op, buffers: dict[str, Buffer], weights: dict[str, Weight]) -> None:
    def width(name: str) -> int:
        return buffers[name].width

    def shape(name: str) -> tuple[int, ...]:
        return weights[name].shape

    match op:
        case ops.Input():
            _require(buffers[op.out].rows is Rows.TOKENS, op, "the caller gives token rows")
        case ops.Embed():
            _require(shape(op.weight) == (program.vocab_size, width(op.out)), op, "table must be (vocab, width)")
        case ops.PositionEmbed():
            _require(shape(op.weight)[1:] == (width(op.out),), op, "table must be (positions, width)")
            _require(width(op.x) == width(op.out), op, "widths must agree")
        case ops.Norm():
            _require(width(op.x) == width(op.out), op, "widths must agree")
            _require(width(op.x) % op.groups == 0, op, "width must divide into groups")
            _require(shape(op.weight) == (width(op.x) // op.groups,), op, "weight must have width / groups elements")
            _require(op.bias is None or shape(op.bias) == shape(op.weight), op, "bias must match weight")
        case ops.Linear() | ops.Logits():
            _require(shape(op.weight) == (width(op.out), width(op.x)), op, "weight must be (out width, x width)")
            _require(op.bias is None or shape(op.bias) == (width(op.out),), op, "bias must have out width elements")
            _require(buffers[op.x].rows == buffers[op.out].rows, op, "rows must agree")
        case ops.Rope():
            _require(width(op.x) == width(op.out) == op.heads * op.head_dim, op, "width must be heads * head_dim")
            _require(0 < op.table.rotary_dim <= op.head_dim, op, "rotary_dim must be at most head_dim")
        case ops.KvWrite():
            _require(0 <= op.layer < len(program.kv_layers), op, "no such KV layer")
            layer = program.kv_layers[op.layer]
            _require(width(op.k) == layer.heads * layer.key_dim, op, "k must be KV heads * key_dim")
            _require(width(op.v) == layer.heads * layer.value_dim, op, "v must be KV heads * value_dim")
        case ops.Attention():
            _require(0 <= op.layer < len(program.kv_layers), op, "no such KV layer")
            layer = program.kv_layers[op.layer]
            _require(layer.heads == op.kv_heads and layer.key_dim == op.head_dim, op, "KV layer must match")
            _require(layer.window == op.window, op, "KV layer's window must match")
            _require(op.heads % op.kv_heads == 0, op, "heads must be a multiple of kv_heads")
            _require(width(op.q) == op.heads * op.head_dim, op, "q must be heads * head_dim")
            _require(width(op.out) == op.heads * layer.value_dim, op, "out must be heads * value_dim")
        case ops.GatedActivation():
            _require(width(op.gate) == width(op.up) == width(op.out), op, "widths must agree")
        case ops.Activation():
            _require(width(op.x) == width(op.out), op, "widths must agree")
        case ops.Add():
            _require(width(op.a) == width(op.b) == width(op.out), op, "widths must agree")
            _require(buffers[op.a].rows == buffers[op.b].rows == buffers[op.out].rows, op, "rows must agree")
        case ops.SelectRows():
            _require(width(op.x) == width(op.out), op, "widths must agree")
            _require(
                buffers[op.x].rows is Rows.TOKENS and buffers[op.out].rows is Rows.OUTPUTS,
                op,
                "selects from token rows into output rows",
            )
        case _:
            assert_never(op)
