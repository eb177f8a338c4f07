"""Tokenizers from a Hugging Face folder's tokenizer.json, with what its config files say about special tokens."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer as Core

from kvarn.errors import ModelFileError
from kvarn.text.gguf import Vocabulary
from kvarn.weights import ModelFiles
from kvarn.weights.hf import read_json_object


def tokenizer_config(files: ModelFiles) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none."""
    path = files.file("tokenizer_config.json")
    return {} if path is None else read_json_object(path)


def vocabulary_from_hf(files: ModelFiles) -> Vocabulary:
    """Reads tokenizer.json. Raises ModelFileError where it is missing or invalid."""
    path = files.file("tokenizer.json")
    if path is None:
        raise ModelFileError("has no tokenizer.json", path=str(files.path))
    try:
        core = Core.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelFileError(f"not a tokenizer: {error}", path=str(path)) from error
    core.no_truncation()
    core.no_padding()
    config = tokenizer_config(files)
    tokens = [core.id_to_token(i) or "" for i in range(core.get_vocab_size(with_added_tokens=True))]
    added = core.get_added_tokens_decoder()
    for index, token in added.items():
        if index < len(tokens):
            tokens[index] = token.content
    state = json.loads(core.to_str())
    pieces = "bytes" if _mentions(state.get("decoder"), "ByteLevel") else "spaces"
    special = frozenset(i for i, token in added.items() if token.special)
    generation = files.generation_config.get("eos_token_id", files.metadata.get("eos_token_id"))
    eos = generation if isinstance(generation, list) else [generation]
    eos.append(_id_of(core, config.get("eos_token")))
    bos = _id_of(core, config.get("bos_token"))
    if bos is None and isinstance(files.metadata.get("bos_token_id"), int):
        bos = files.metadata["bos_token_id"]
    empty = core.encode("", add_special_tokens=True).ids
    valid = [i for i in eos if isinstance(i, int) and 0 <= i < len(tokens)]
    return Vocabulary(
        core=core,
        pieces=pieces,
        tokens=tokens,
        special=special,
        added=frozenset(added),
        bos=bos,
        eos=tuple(dict.fromkeys(valid)),
        add_bos=bos is not None and empty[:1] == [bos],
        add_eos=bool(empty) and empty[-1] in valid and empty[-1] != bos,
        space_prefix=pieces == "spaces" and _mentions(state.get("decoder"), "Strip"),
    )


def _mentions(section: Any, kind: str) -> bool:
    """Whether a decoder section, or one of its parts, is of this kind."""
    if not isinstance(section, dict):
        return False
    return section.get("type") == kind or any(_mentions(part, kind) for part in section.get("decoders", ()))


def _id_of(core: Core, token: Any) -> int | None:
    """The id of a token given as a string or as {"content": string}."""
    content = token.get("content") if isinstance(token, dict) else token
    return core.token_to_id(content) if isinstance(content, str) else None
