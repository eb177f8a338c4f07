"""A draft model that can say fewer tokens than it reads: the first rows of its logits' weight, and no others.

Tokens of byte pair encodings are numbered as they were merged, the commonest first (Sennrich et al. 2016, section 3.2),
so the first of them are most of what is said. A guess need not be right, and a target's logits are never cut.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from kvarn.program import Logits, Program, Weight
from kvarn.program.program import weights_read
from kvarn.tensors import Tensor, TensorSource


def with_fewer_tokens(program: Program, count: int) -> Program:
    """The program with logits of its first `count` tokens. Reads all tokens as before."""
    logits = next(op for op in program.ops if isinstance(op, Logits) and op.out == program.output)
    if count >= program.weight(logits.weight).shape[0]:
        return program
    bias = None if logits.bias is None else _cut_name(logits.bias, count)
    cut = replace(logits, weight=_cut_name(logits.weight, count), bias=bias)
    ops = tuple(cut if op is logits else op for op in program.ops)
    read = {name for op in ops for name in weights_read(op)}
    kept = tuple(weight for weight in program.weights if weight.name in read)
    added = [
        Weight(_cut_name(name, count), (count, *program.weight(name).shape[1:]))
        for name in (logits.weight, logits.bias)
        if name is not None
    ]
    buffers = tuple(replace(b, width=count) if b.name == program.output else b for b in program.buffers)
    return replace(program, ops=ops, weights=(*kept, *added), buffers=buffers)


class CutSource:
    """The weights of `with_fewer_tokens`. Implements `TensorSource`."""

    def __init__(self, source: TensorSource, names: Collection[str], count: int) -> None:
        """source: of the whole program. names: its weights."""
        self._source = source
        self._whole = {_cut_name(name, count): name for name in names}
        self._count = count

    def tensor(self, name: str) -> Tensor:
        """See `TensorSource`."""
        whole = self._whole.get(name)
        return self._source.tensor(name) if whole is None else self._source.tensor(whole).first(self._count)

    def release(self) -> None:
        """See `TensorSource`."""
        self._source.release()


def _cut_name(name: str, count: int) -> str:
    return f"{name}[:{count}]"
