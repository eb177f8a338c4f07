"""From files to a `Model`: finds the family by the name that the files give, and nothing else does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvarn.errors import ModelFileError, UnsupportedModelError
from kvarn.models import gemma3, gpt2, llama, mistral, qwen2, qwen3
from kvarn.models.config import ConfigReader, ModelConfig, shown
from kvarn.models.decoder import Blueprint
from kvarn.models.family import Family, LoadOptions
from kvarn.models.source import MappedSource, NameMap, with_prefix
from kvarn.program import Program
from kvarn.tensors.dequantize import dequantize
from kvarn.weights import ModelFiles

FAMILIES: tuple[Family, ...] = (
    gpt2.FAMILY, llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, gemma3.FAMILY,
)  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Model:
    """A model ready for a back-end: sizes, program, and the source of its weights (views of the open files)."""

    config: ModelConfig
    program: Program
    weights: MappedSource


def find_family(metadata: Mapping[str, Any], format: Literal["gguf", "hf"], path: str) -> tuple[Family, str]:
    """The family, and the name that the files give it. Raises ModelFileError, UnsupportedModelError."""
    key = "general.architecture" if format == "gguf" else "model_type"
    name = metadata.get(key)
    if not isinstance(name, str):
        raise ModelFileError(f"must be a string, not {shown(name)}", path=path, field=key)
    for family in FAMILIES:
        if name in (family.gguf_architectures if format == "gguf" else family.hf_types):
            return family, name
    known = sorted({n for f in FAMILIES for n in (f.gguf_architectures if format == "gguf" else f.hf_types)})
    raise UnsupportedModelError(f"{path}: {key} {shown(name)} is not supported ({', '.join(known)} are)")


def _blueprint(
    family: Family,
    name: str,
    metadata: Mapping[str, Any],
    format: Literal["gguf", "hf"],
    path: str,
    tensor_names: Collection[str] | None,
    options: LoadOptions,
) -> Blueprint:
    prefix = f"{name}." if format == "gguf" else ""
    reader = ConfigReader(metadata, path=path, prefix=prefix, tensor_names=tensor_names)
    for key in ("expert_count",) if format == "gguf" else ("num_local_experts", "num_experts", "n_routed_experts"):
        if reader.integer(key, 0, low=0) > 1:
            raise reader.unsupported(key, "mixtures of experts are not supported")
    if format == "gguf":
        return family.from_gguf(reader, options)
    if reader.get("quantization_config") is not None:
        raise reader.unsupported("quantization_config", "quantized checkpoints are not supported (GGUF files are)")
    return family.from_hf(reader, options)


def program_from_config(
    metadata: Mapping[str, Any],
    format: Literal["gguf", "hf"],
    *,
    path: str = "config.json",
    tensor_names: Collection[str] | None = None,
    max_model_len: int | None = None,
) -> tuple[ModelConfig, Program]:
    """Sizes and program from a config alone: no weights are needed.

    metadata: a parsed config.json, or GGUF key-value pairs. max_model_len: the longest sequence that will be run,
    where that decides (longrope). Raises ModelFileError naming the field, UnsupportedModelError naming the feature.
    """
    family, name = find_family(metadata, format, path)
    options = LoadOptions(max_model_len)
    blueprint = _blueprint(family, name, metadata, format, path, tensor_names, options)
    return blueprint.config, family.build(blueprint)


def load_model(files: ModelFiles, max_model_len: int | None = None) -> Model:
    """The model in open files; every tensor's presence and shape is checked, none is read.

    Raises ModelFileError where config and tensors disagree, UnsupportedModelError where kvarn lacks what it needs.
    """
    path = str(files.path)
    family, name = find_family(files.metadata, files.format, path)
    factors = None
    if files.format == "gguf" and ROPE_FACTORS in files.tensor_names:
        factors = dequantize(files.tensor(ROPE_FACTORS))
    options = LoadOptions(max_model_len, factors)
    blueprint = _blueprint(family, name, files.metadata, files.format, path, files.tensor_names, options)
    config = blueprint.config
    if files.format == "hf":
        generation = ConfigReader(files.generation_config, path=f"{path}: generation_config.json")
        eos = dict.fromkeys((*generation.token_ids("eos_token_id"), *config.eos_token_ids))
        config = replace(config, eos_token_ids=tuple(eos))
        names: NameMap = with_prefix(family.hf_names, _hf_prefix(family, files))
        ignored = family.hf_ignored
    else:
        names, ignored = family.gguf_names, family.gguf_ignored
    program = family.build(blueprint)
    return Model(config, program, MappedSource(files, program, names, ignored))


def _hf_prefix(family: Family, files: ModelFiles) -> str:
    """What the checkpoint puts before its tensor names, found by the embedding's."""
    embedding = family.hf_names["embed.weight"].name
    for prefix in family.hf_prefixes:
        if prefix + embedding in files.tensor_names:
            return prefix
    raise ModelFileError("the files lack this tensor", path=str(files.path), field=family.hf_prefixes[0] + embedding)
