"""Small vocabularies of both kinds, as GGUF metadata and as tokenizers."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvarn.text.gguf import vocabulary_from_gguf
from kvarn.text.tokenizer import Tokenizer
from kvarn.text.vocabulary import byte_of_character

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CHARACTER_OF_BYTE = {byte: character for character, byte in byte_of_character().items()}


def spelt(data: bytes) -> str:
    """Bytes in GPT-2's characters."""
    return "".join(CHARACTER_OF_BYTE[byte] for byte in data)


def byte_level(
    merges: Sequence[tuple[bytes, bytes]] = (),
    *,
    control: Sequence[str] = ("<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    defined: Sequence[str] = (),
    pre: str = "gpt-2",
    **more: Any,
) -> dict[str, Any]:
    """Metadata of a byte-level vocabulary: all bytes, what the merges make, then the special tokens.

    more: further `tokenizer.ggml.` keys, over those made here; None leaves one out.
    """
    tokens = [CHARACTER_OF_BYTE[byte] for byte in range(256)]
    tokens += list(dict.fromkeys(spelt(left + right) for left, right in merges))
    types = [NORMAL] * len(tokens) + [CONTROL] * len(control) + [USER_DEFINED] * len(defined)
    tokens += [*control, *defined]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": [f"{spelt(left)} {spelt(right)}" for left, right in merges],
        "bos_token_id": tokens.index("<s>") if "<s>" in tokens else None,
        "eos_token_id": tokens.index("</s>") if "</s>" in tokens else None,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def sentencepiece(
    scores: Mapping[str, float], *, defined: Sequence[str] = (), all_bytes: bool = True, **more: Any
) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary: <unk> <s> </s>, tokens for bytes, user-defined ones, then `scores`."""
    entries = [("<unk>", UNKNOWN, 0.0), ("<s>", CONTROL, 0.0), ("</s>", CONTROL, 0.0)]
    entries += [(f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)] if all_bytes else []
    entries += [(text, USER_DEFINED, 0.0) for text in defined]
    entries += [(text, NORMAL, score) for text, score in scores.items()]
    values = {
        "model": "llama",
        "tokens": [text for text, _, _ in entries],
        "token_type": [kind for _, kind, _ in entries],
        "scores": [score for _, _, score in entries],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def tokenizer(metadata: Mapping[str, Any], **sources: str) -> Tokenizer:
    """The tokenizer of the metadata; sources: chat templates by name."""
    return Tokenizer(vocabulary_from_gguf(metadata, "test.gguf"), sources)


def texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The tokens' spellings."""
    return [tokenizer.token_text(token) for token in ids]
