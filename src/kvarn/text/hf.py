"""`vocabulary_from_hf`: tokenizers from a Hugging Face folder's tokenizer.json and the configs beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from threading import Lock
from typing import Any

from tokenizers import Tokenizer as Core
from tokenizers import pre_tokenizers

from kvarn.errors import ModelFileError, UnsupportedModelError
from kvarn.text.packed_texts import PackedTexts
from kvarn.text.special import Span, TokenFinder
from kvarn.text.vocabulary import Pieces, Vocabulary, end_tokens
from kvarn.weights import ModelFiles
from kvarn.weights.hf import read_json_object

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
MAX_TOKENS = 1 << 24
NAMED_TOKENS = ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class LibraryEncoder:
    """The encoder of a tokenizer.json, run whole by the `tokenizers` library. Thread-safe."""

    def __init__(self, core: Core, special: Mapping[str, int]) -> None:
        self._core = core
        self._special = special
        self._lock = Lock()  # the library keeps "special tokens are text" as a state of the tokenizer

    def encode(self, text: str, *, parse_special: bool, literal: Sequence[Span] = ()) -> list[int]:
        """Token ids of the text; see `Encoder`."""
        if not parse_special or not literal:
            return self._run(text, parse_special)
        ids: list[int] = []
        position = 0
        for start, end, token in TokenFinder(self._special, {}).find(text, literal):
            ids += self._run(text[position:start], False, first=position == 0)
            ids.append(token)
            position = end
        return ids + self._run(text[position:], False, first=position == 0)

    def _run(self, text: str, parse_special: bool, *, first: bool = True) -> list[int]:
        if not text:
            return []
        with self._lock:
            self._core.encode_special_tokens = not parse_special
            words = self._core.pre_tokenizer
            prefixed = isinstance(words, pre_tokenizers.Metaspace) and words.prepend_scheme == "first"
            if prefixed and not first:
                words.prepend_scheme = "never"
            try:
                # Unlike encode, the batch call lets other threads run: a long text takes seconds.
                (encoded,) = self._core.encode_batch_fast([text], add_special_tokens=False)
                ids: list[int] = encoded.ids
            finally:
                if prefixed:
                    words.prepend_scheme = "first"
        return ids


def tokenizer_config(files: ModelFiles) -> Mapping[str, Any]:
    """tokenizer_config.json; empty where there is none. Raises ModelFileError."""
    path = files.file(CONFIG)
    return {} if path is None else read_json_object(path)


def vocabulary_from_hf(files: ModelFiles) -> Vocabulary:
    """Reads tokenizer.json. Raises ModelFileError where it is missing or invalid, UnsupportedModelError where its
    tokens cannot be decoded one by one."""
    path = files.file(TOKENIZER)
    if path is None:
        raise ModelFileError(
            "is missing; transformers' `save_pretrained` of a fast tokenizer writes it", path=str(files.path),
            field=TOKENIZER,
        )  # fmt: skip
    try:
        core = Core.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelFileError(f"is no tokenizer: {error}", path=str(path)) from error
    core.no_truncation()
    core.no_padding()
    state = {name: _state(getattr(core, name)) for name in ("decoder", "pre_tokenizer")}
    tokens = _tokens(core, str(path))
    added = core.get_added_tokens_decoder()
    special = frozenset(index for index, token in added.items() if token.special)
    pieces = _pieces(state, str(path))
    config = tokenizer_config(files)
    begin = core.encode("", add_special_tokens=True).ids
    eos = [i for i in _end_ids(files, config, core) if i < len(tokens)]
    special |= frozenset(eos)
    bos = _token_id(core, config.get("bos_token"), files.metadata.get("bos_token_id"))
    return Vocabulary(
        tokens=PackedTexts(tokens),
        pieces=pieces,
        encoder=LibraryEncoder(core, {tokens[index]: index for index in special}),
        special=special,
        verbatim=frozenset(added) | special,
        byte_tokens=_byte_tokens(state, tokens),
        padding=frozenset(),
        bos=bos,
        eos=end_tokens(tokens, special, eos),
        add_bos=bos is not None and begin[:1] == [bos],
        add_eos=bool(begin) and bool(eos) and begin[-1] == eos[0] and begin[-1:] != [bos],
        space_prefix=pieces is Pieces.SPACES and _strips_space(state),
        names=tuple((name, text) for name in NAMED_TOKENS if (text := _content(config.get(name))) is not None),
    )


def _tokens(core: Core, path: str) -> list[str]:
    ids = core.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    if size > MAX_TOKENS:
        raise ModelFileError(
            f"has the token id {size - 1}, ids below {MAX_TOKENS} are allowed", path=path, field="vocab"
        )
    tokens = [""] * size
    for text, index in ids.items():
        tokens[index] = text
    return tokens


def _state(part: Any) -> Any:
    """A part of the tokenizer as tokenizer.json describes it."""
    return None if part is None else json.loads(part.__getstate__())


def _components(section: Any) -> Iterator[Mapping[str, Any]]:
    """A part of tokenizer.json, taken apart where it is a sequence of parts."""
    if not isinstance(section, dict):
        return
    parts = next((section[key] for key in ("decoders", "pretokenizers", "normalizers") if key in section), None)
    if section.get("type") == "Sequence" and isinstance(parts, list):
        for part in parts:
            yield from _components(part)
    else:
        yield section


def _pieces(state: Mapping[str, Any], path: str) -> Pieces:
    decoders = {part.get("type") for part in _components(state.get("decoder"))}
    if "ByteLevel" in decoders or (
        not decoders and any(part.get("type") == "ByteLevel" for part in _components(state.get("pre_tokenizer")))
    ):
        return Pieces.BYTES
    if decoders & {"Metaspace", "ByteFallback", "Replace"}:
        return Pieces.SPACES
    kind = ", ".join(sorted(str(kind) for kind in decoders)) or "none"
    raise UnsupportedModelError(
        f"{path}: decoder: {kind} is not supported; kinds that give each token's text by itself are "
        "(ByteLevel, and SentencePiece's Metaspace or Replace with ByteFallback)"
    )


def _byte_tokens(state: Mapping[str, Any], tokens: Sequence[str]) -> frozenset[int]:
    if not any(part.get("type") == "ByteFallback" for part in _components(state.get("decoder"))):
        return frozenset()
    spellings = {f"<0x{byte:02X}>" for byte in range(256)}
    return frozenset(index for index, token in enumerate(tokens) if token in spellings)


def _strips_space(state: Mapping[str, Any]) -> bool:
    for part in _components(state.get("decoder")):
        if part.get("type") == "Strip" and part.get("content") == " " and part.get("start"):
            return True
        if part.get("type") == "Metaspace":
            scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
            return bool(scheme != "never")
    return False


def _content(token: Any) -> str | None:
    """The text of a token given as a string or as {"content": string}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _token_id(core: Core, token: Any, otherwise: Any) -> int | None:
    text = _content(token)
    index = core.token_to_id(text) if text is not None else None
    if index is None and type(otherwise) is int and otherwise >= 0:
        return otherwise if core.id_to_token(otherwise) is not None else None
    return index


def _end_ids(files: ModelFiles, config: Mapping[str, Any], core: Core) -> list[int]:
    """What tokenizer_config.json, then generation_config.json, or else config.json, name as the end."""
    named = _token_id(core, config.get("eos_token"), None)
    stated = files.generation_config.get("eos_token_id", files.metadata.get("eos_token_id"))
    ids = [named, *(stated if isinstance(stated, list) else [stated])]
    return list(dict.fromkeys(i for i in ids if type(i) is int and i >= 0))
