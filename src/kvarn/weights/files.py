"""`open_model`: one view of a model's files, whatever their format."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from kvarn.errors import ModelFileError
from kvarn.tensors import DType, Tensor
from kvarn.weights.fingerprint import Source


class ModelFiles(Protocol):
    """An open model. Tensors are views of mapped files, valid until `close`."""

    path: Path
    format: Literal["gguf", "hf"]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """GGUF's key-value pairs, or the parsed config.json."""
        ...

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The parsed generation_config.json; empty where there is none."""
        ...

    @property
    def tensor_names(self) -> Collection[str]:
        """Names of all tensors, as the files have them."""
        ...

    def tensor_info(self, name: str) -> tuple[DType, tuple[int, ...]]:
        """Type and row-major shape. Raises ModelFileError where there is no such tensor."""
        ...

    def tensor(self, name: str) -> Tensor:
        """A view of the tensor. Raises ModelFileError where there is no such tensor."""
        ...

    def file(self, name: str) -> Path | None:
        """A file beside the weights (tokenizer.json, …); None where there is none."""
        ...

    def sources(self) -> Sequence[Source]:
        """The weight files, in order; none where the weights came from memory."""
        ...

    def release(self) -> None:
        """Lets the pages go that were read so far: they no longer count as this process's. Tensors stay valid."""
        ...

    def close(self) -> None:
        """Gives the mappings up."""
        ...

    def __enter__(self) -> ModelFiles: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_model(path: str | Path) -> ModelFiles:
    """Opens a GGUF file or a Hugging Face folder and checks its headers. Raises ModelFileError."""
    path = Path(path)
    if path.is_dir():
        from kvarn.weights.hf import HfModelFiles

        return HfModelFiles(path)
    if not path.exists():
        raise ModelFileError("no such file or folder", path=str(path))
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise ModelFileError(
            "pickled checkpoints are never read, since loading one can run code: convert it to safetensors "
            "(transformers' save_pretrained does) and give the folder",
            path=str(path),
        )
    if path.suffix == ".safetensors":
        raise ModelFileError(f"give the folder, {path.parent}: its config.json is needed too", path=str(path))
    from kvarn.weights.gguf_files import GGUFModelFiles

    return GGUFModelFiles(path)
