"""A Hugging Face folder as `ModelFiles`: config.json, safetensors (sharded or not), tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from kvarn.errors import ModelFileError
from kvarn.tensors import DType, Tensor
from kvarn.weights.fingerprint import Source
from kvarn.weights.safetensors import SafetensorsFile

MAX_JSON_BYTES = 64 << 20
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelFileError naming what is wrong."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFileError(f"larger than {MAX_JSON_BYTES} bytes", path=str(path))
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror or error}", path=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"not JSON: {error}", path=str(path)) from error
    if not isinstance(value, dict):
        raise ModelFileError("must be a JSON object", path=str(path))
    return value


class HfModelFiles:
    """A folder as `save_pretrained` writes it. Shards are mapped at once and checked; no pickle is ever read."""

    format: Literal["gguf", "hf"] = "hf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, Any] = read_json_object(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config: Mapping[str, Any] = read_json_object(generation) if generation.exists() else {}
        self._shard_of: dict[str, SafetensorsFile] = {}
        self._shards = [SafetensorsFile(file) for file in self._shard_files()]
        for shard in self._shards:
            for name in shard.tensors:
                if name in self._shard_of:
                    raise ModelFileError("in two shards", path=str(path), field=name)
                self._shard_of[name] = shard

    def _shard_files(self) -> list[Path]:
        whole, index = self.path / WEIGHTS, self.path / INDEX
        if whole.exists():
            return [whole]
        if not index.exists():
            pickles = sorted(f.name for f in self.path.glob("*.bin"))
            hint = f" ({pickles[0]} is pickled and never read: convert it to safetensors)" if pickles else ""
            raise ModelFileError(f"has neither {WEIGHTS} nor {INDEX}{hint}", path=str(self.path))
        names = read_json_object(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise ModelFileError("must map tensor names to file names", path=str(index), field="weight_map")
        files = []
        for name in sorted(set(names.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelFileError(f"names the file {name!r}, which is not a shard of this folder", path=str(index),
                                     field="weight_map")  # fmt: skip
            files.append(self.path / name)
        return files

    @property
    def tensor_names(self) -> Collection[str]:
        """Names of all tensors of all shards."""
        return self._shard_of.keys()

    def tensor_info(self, name: str) -> tuple[DType, tuple[int, ...]]:
        """Type and shape. Raises ModelFileError where there is no such tensor."""
        return self._shard(name).info(name)

    def tensor(self, name: str) -> Tensor:
        """A view of the tensor. Raises ModelFileError where there is no such tensor."""
        return self._shard(name).tensor(name)

    def _shard(self, name: str) -> SafetensorsFile:
        if name not in self._shard_of:
            raise ModelFileError("the files have no such tensor", path=str(self.path), field=name)
        return self._shard_of[name]

    def file(self, name: str) -> Path | None:
        """A file of the folder; None where there is none."""
        path = self.path / name
        return path if Path(name).name == name and path.is_file() else None

    def sources(self) -> list[Source]:
        """The shards."""
        return [shard.source() for shard in self._shards]

    def release(self) -> None:
        """Lets the pages go that were read."""
        for shard in self._shards:
            shard.release()

    def close(self) -> None:
        """Gives the mappings up."""
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> HfModelFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
