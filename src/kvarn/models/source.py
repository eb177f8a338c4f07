"""From a program's weight names to a file's tensors: `TensorRef` says where one lies, `MappedSource` fetches it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from kvarn.errors import ModelFileError, UnsupportedModelError
from kvarn.program import Program
from kvarn.tensors import DType, Tensor
from kvarn.tensors.dequantize import dequantize
from kvarn.weights import ModelFiles


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of the file and what to do with it, in this order.

    name: with "{i}" for the layer. transpose: the file has (in, out). part: (index, count), one of `count` equal parts
    along the output rows. plus_one: the file has w where the program wants 1 + w (Gemma's norms).
    """

    name: str
    transpose: bool = False
    part: tuple[int, int] | None = None
    plus_one: bool = False


NameMap = Mapping[str, TensorRef]
"""Program weight name, with "{i}" for the layer, to its tensor."""

LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def reference_of(names: NameMap, weight: str) -> TensorRef:
    """Where the program's weight lies. Raises KeyError for a name the family does not map."""
    layer = LAYER.search(weight)
    if layer is None:
        return names[weight]
    ref = names[LAYER.sub("{i}", weight)]
    return replace(ref, name=ref.name.replace("{i}", layer.group()))


class MappedSource:
    """`TensorSource` over open files. Checks presence and shape of every weight at construction, reads nothing yet.

    ignored: pattern of tensors that a file may hold beside the program's. Any other is a part of the model that the
    program does not have, so the file is refused (UnsupportedModelError) rather than run wrongly.
    """

    def __init__(self, files: ModelFiles, program: Program, names: NameMap, ignored: str) -> None:
        self._files = files
        self._refs = {w.name: reference_of(names, w.name) for w in program.weights}
        for weight in program.weights:
            self._check(self._refs[weight.name], weight.shape)
        used = {ref.name for ref in self._refs.values()}
        self._refuse_unknown(files.tensor_names, used, re.compile(ignored))

    def _check(self, ref: TensorRef, shape: tuple[int, ...]) -> None:
        if ref.name not in self._files.tensor_names:
            raise ModelFileError("the file lacks this tensor", path=str(self._files.path), field=ref.name)
        _, found = self._files.tensor_info(ref.name)
        expected = shape if ref.part is None else (shape[0] * ref.part[1], *shape[1:])
        expected = tuple(reversed(expected)) if ref.transpose else expected
        if found != expected:
            raise ModelFileError(
                f"has shape {found}, the config asks for {expected}", path=str(self._files.path), field=ref.name
            )

    def _refuse_unknown(self, present: Collection[str], used: set[str], ignored: re.Pattern[str]) -> None:
        unknown = sorted(name for name in present if name not in used and not ignored.search(name))
        if unknown:
            raise UnsupportedModelError(
                f"{self._files.path}: {len(unknown)} tensors belong to no part of this family that kvarn runs, "
                f"{unknown[0]!r} the first"
            )

    def recipe(self) -> str:
        """What is done to which tensors: over the same files, sources of one recipe have the same weights."""
        return repr(sorted(self._refs.items(), key=lambda item: item[0]))

    def tensor(self, name: str) -> Tensor:
        """The tensor of the program's weight `name`: a view where nothing must be done to it."""
        ref = self._refs[name]
        tensor = self._files.tensor(ref.name)
        if ref.transpose:
            tensor = _transposed(tensor)
        if ref.part is not None:
            tensor = _part(tensor, *ref.part)
        if ref.plus_one:
            tensor = Tensor.from_array(dequantize(tensor) + np.float32(1))
        return tensor

    def release(self) -> None:
        """Lets the pages go that were read of the files."""
        self._files.release()


def _transposed(tensor: Tensor) -> Tensor:
    if tensor.dtype.quantized:
        return Tensor.from_array(dequantize(tensor).T)
    words = np.uint32 if tensor.dtype is DType.F32 else np.uint16
    turned = np.ascontiguousarray(np.frombuffer(tensor.data.tobytes(), dtype=words).reshape(tensor.shape).T)
    return Tensor(tensor.dtype, turned.shape, turned.view(np.uint8).reshape(-1))


def _part(tensor: Tensor, index: int, count: int) -> Tensor:
    rows = tensor.shape[0] // count
    if len(tensor.shape) == 2:
        return tensor.row_slice(index * rows, (index + 1) * rows)
    size = tensor.nbytes // count
    return Tensor(tensor.dtype, (rows,), tensor.data[index * size : (index + 1) * size])


def with_prefix(names: NameMap, prefix: str) -> NameMap:
    """The same map with a prefix before every tensor name but the LM head's."""
    return {k: r if k == "lm_head.weight" else replace(r, name=prefix + r.name) for k, r in names.items()}
