"""A GGUF file as `ModelFiles`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from kvarn.errors import ModelFileError
from kvarn.tensors import DType, Tensor
from kvarn.weights.fingerprint import Source
from kvarn.weights.gguf import GGUFFile


class GGUFModelFiles:
    """One GGUF file: metadata, tokenizer and tensors in one."""

    format: Literal["gguf", "hf"] = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile.open(path)
        if self._file.metadata.get("split.count", 1) not in (0, 1):
            raise ModelFileError("a part of a split file; merge the parts first", path=str(path), field="split.count")

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's key-value pairs."""
        return self._file.metadata

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """Empty: GGUF has none."""
        return {}

    @property
    def tensor_names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._file.tensors.keys()

    def tensor_info(self, name: str) -> tuple[DType, tuple[int, ...]]:
        """Type and row-major shape. Raises ModelFileError where there is no such tensor."""
        info = self._file.tensors.get(name)
        if info is None:
            raise ModelFileError("the file has no such tensor", path=str(self.path), field=name)
        return info.dtype, info.shape

    def tensor(self, name: str) -> Tensor:
        """A view of the tensor. Raises ModelFileError where there is no such tensor."""
        return self._file.tensor(name)

    def file(self, name: str) -> Path | None:  # noqa: ARG002 (a GGUF has nothing beside it)
        """None: everything is in the file."""
        return None

    def sources(self) -> list[Source]:
        """The file."""
        return self._file.sources()

    def release(self) -> None:
        """Lets the pages go that were read."""
        self._file.release()

    def close(self) -> None:
        """Gives the mapping up."""
        self._file.close()

    def __enter__(self) -> GGUFModelFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
