"""A program's weights on the card: matrices in the chosen form, tables and vectors as they are read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kvarn.backends.cuda.forms import DENSE, STORED, MatrixForm
from kvarn.backends.cuda.launches import Lowered
from kvarn.backends.cuda.packing import Dense, Weight, put_rows, room_for
from kvarn.backends.cuda.quantize import from_stored, quantize_fp8, quantize_int4, quantize_int8
from kvarn.config import CudaConfig
from kvarn.errors import UnsupportedModelError
from kvarn.program import Program
from kvarn.program import Weight as Parameter
from kvarn.tensors import DType, Tensor, TensorSource
from kvarn.tensors.dequantize import dequantize as stored_values

RELEASE_BYTES = 64 << 20
PIECE_BYTES = 8 << 20
"""Of a stored matrix as float32 at a time, six of which packing takes at most: less than cuBLAS' workspaces will."""
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Weights:
    """Owns a program's weights on the device, by the names whose rows they are, one below the other.

    matrices: what rows of activations are multiplied with. vectors: tables of embeddings and biases, of the type that
    is computed in, and what norms read, float32.
    """

    matrices: dict[tuple[str, ...], Weight] = field(default_factory=dict)
    vectors: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict)

    def only(self, names: Collection[str]) -> Weights:
        """Those of these names, which stand alone, for another executable. Shares the memory."""
        return Weights(
            {(name,): self.matrices[(name,)] for name in names if (name,) in self.matrices},
            {(name,): self.vectors[(name,)] for name in names if (name,) in self.vectors},
        )


class WeightLoader:
    """Reads weights from their source; of the source little more than a matrix is in memory at a time."""

    def __init__(
        self,
        program: Program,
        source: TensorSource,
        config: CudaConfig,
        forms: Mapping[str, MatrixForm],
    ) -> None:
        self._program = program
        self._source = source
        self._dtype = TORCH_DTYPES[config.dtype]
        self._stored = config.weights == "stored"
        self._forms = forms
        self._device = torch.device(config.device)
        self._unreleased = 0

    def load(self, lowered: Lowered, known: Weights) -> Weights:
        """All weights as the launches want them. known: what another executable holds, which is used as it is."""
        found = Weights(dict(known.matrices), dict(known.vectors))
        for name, of_norm in lowered.others.items():
            if (name,) not in found.vectors:
                found.vectors[(name,)] = self._dense([name], torch.float32 if of_norm else self._dtype)
        for names in lowered.matrices:
            if names not in found.matrices:
                table = found.vectors.get(names)
                found.matrices[names] = self._matrix(names) if table is None else Dense(table)
        for names in lowered.biases:
            if names not in found.vectors:
                found.vectors[names] = self._dense(names, self._dtype)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what packing took
        return found

    def _matrix(self, names: Sequence[str]) -> Weight:
        """One matrix of all, in the form that they have in common; packed on the card, a few rows at a time, into the
        place where it stays."""
        form = self._forms.get(names[0], DENSE)
        if form.kind == "dense":
            return Dense(self._dense(names, self._dtype))
        rows = sum(self._program.weight(name).shape[0] for name in names)
        whole: Weight | None = None
        start = 0
        for name in names:
            tensor = self._tensor(self._program.weight(name))
            for part in _row_parts(tensor):
                packed = self._packed(part, form)
                whole = whole or room_for(packed, rows)
                put_rows(whole, start, packed)
                start += part.shape[0]
            self._note_read(tensor)
        assert whole is not None, "a program has no matrix of no rows"
        return whole

    def _packed(self, part: Tensor, form: MatrixForm) -> Weight:
        if STORED.get(part.dtype) == form and self._stored:
            return from_stored(part, self._dtype, self._device)
        values = _on_host(part).to(self._device)
        match form.kind:
            case "int4":
                assert form.group is not None
                return quantize_int4(values, form.group)
            case "int8":
                return quantize_int8(values)
            case _:
                return quantize_fp8(values)

    def _dense(self, names: Sequence[str], dtype: torch.dtype) -> torch.Tensor:
        """The rows of all, one below the other, in one tensor on the device."""
        parameters = [self._program.weight(name) for name in names]
        rows = sum(parameter.shape[0] for parameter in parameters)
        out = torch.empty((rows, *parameters[0].shape[1:]), dtype=dtype, device=self._device)
        start = 0
        for parameter in parameters:
            tensor = self._tensor(parameter)
            for part in _row_parts(tensor):
                out[start : start + part.shape[0]].copy_(_on_host(part).to(dtype))
                start += part.shape[0]
            self._note_read(tensor)
        return out

    def _tensor(self, parameter: Parameter) -> Tensor:
        tensor = self._source.tensor(parameter.name)
        if tensor.shape != parameter.shape:
            raise UnsupportedModelError(
                f"weight {parameter.name} has shape {tensor.shape}, the program wants {parameter.shape}"
            )
        return tensor

    def _note_read(self, tensor: Tensor) -> None:
        self._unreleased += tensor.nbytes
        if self._unreleased >= RELEASE_BYTES:
            self._source.release()
            self._unreleased = 0


def _row_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The rows of a tensor, so many at a time."""
    rows, at_once = tensor.shape[0], max(1, PIECE_BYTES // (4 * tensor.shape[-1]))
    if len(tensor.shape) == 1 or rows <= at_once:
        yield tensor
        return
    for first in range(0, rows, at_once):
        yield tensor.row_slice(first, min(rows, first + at_once))


def _on_host(tensor: Tensor) -> torch.Tensor:
    """The values of a stored tensor, in the type that holds them with the fewest bytes."""
    if tensor.dtype is DType.BF16:
        bits = torch.from_numpy(np.array(tensor.data).view(np.int16).reshape(tensor.shape))
        return bits.view(torch.bfloat16)
    if tensor.dtype is DType.F16:
        return torch.from_numpy(np.array(tensor.data).view(np.float16).reshape(tensor.shape))
    return torch.from_numpy(np.array(stored_values(tensor)))

