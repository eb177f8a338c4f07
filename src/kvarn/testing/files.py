"""Model files that lie in memory: what `open_model` gives, without a disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from kvarn.errors import ModelFileError
from kvarn.tensors import DType, Tensor
from kvarn.weights.fingerprint import Source


@dataclass
class MemoryFiles:
    """`ModelFiles` over given metadata and tensors. Owns them; `close` does nothing."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    format: Literal["gguf", "hf"] = "gguf"
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    path: Path = Path("memory")

    @property
    def tensor_names(self) -> Collection[str]:
        """Names of all tensors."""
        return self.tensors.keys()

    def tensor_info(self, name: str) -> tuple[DType, tuple[int, ...]]:
        """Type and shape. Raises ModelFileError where there is no such tensor."""
        tensor = self.tensor(name)
        return tensor.dtype, tensor.shape

    def tensor(self, name: str) -> Tensor:
        """The tensor. Raises ModelFileError where there is no such tensor."""
        if name not in self.tensors:
            raise ModelFileError("no such tensor", path=str(self.path), field=name)
        return self.tensors[name]

    def file(self, name: str) -> Path | None:  # noqa: ARG002 (there is nothing beside what is in memory)
        """None: there are no side files."""
        return None

    def sources(self) -> list[Source]:
        """None: there is no file."""
        return []

    def release(self) -> None:
        """Nothing to let go."""

    def close(self) -> None:
        """Nothing to give up."""

    def __enter__(self) -> MemoryFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
