"""Logprobs in the shapes of the two APIs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvarn.request import TokenLogprob
from kvarn.text import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON has not."""


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def _text(tokenizer: Tokenizer, token: int) -> str:
    """The token as text; `bytes:\\xe2\\x82` where it is no whole text, so that such tokens stay apart."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _name(tokenizer: Tokenizer, token: int, as_ids: bool) -> str:
    return f"token_id:{token}" if as_ids else _text(tokenizer, token)


def chat_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], *, as_ids: bool = False
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion. as_ids: tokens are told as `token_id:5`."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": _name(tokenizer, token, as_ids), "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        {**entry(item.token_id, item.logprob), "top_logprobs": [entry(*alternative) for alternative in item.top]}
        for item in logprobs
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], as_ids: bool
) -> list[dict[str, dict[str, Any]] | None]:
    """`prompt_logprobs` in vLLM's shape: null for the first token, then by token id what is known of it."""

    def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": _name(tokenizer, token, as_ids)}

    found: list[dict[str, dict[str, Any]] | None] = [None]
    for item in logprobs:
        told = {str(item.token_id): entry(item.token_id, item.logprob, item.rank)}
        for rank, (token, logprob) in enumerate(item.top, 1):
            told.setdefault(str(token), entry(token, logprob, rank))
        found.append(told)
    return found


def completion_logprobs(
    tokenizer: Tokenizer,
    logprobs: Sequence[TokenLogprob | int],
    offset: int,
    *,
    skip_special_tokens: bool,
    as_ids: bool = False,
) -> tuple[dict[str, Any], int]:
    """`choices[].logprobs` of a completion, and the offset after these tokens.

    offset: characters of the text before these tokens. A token that ends inside a code point counts those it begins.
    as_ids: tokens are told as `token_id:5`. One of `logprobs` that is a token id has none: a prompt's first.
    """
    tokens: list[str] = []
    offsets: list[int] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for item in logprobs:
        token_id = item if isinstance(item, int) else item.token_id
        text = _name(tokenizer, token_id, as_ids)
        tokens.append(text)
        offsets.append(offset)
        shown = tokenizer.text_bytes(token_id, skip_special_tokens)
        offset += sum(byte & 0xC0 != 0x80 for byte in shown)
        if isinstance(item, int):
            values.append(None)
            tops.append(None)
            continue
        values.append(_finite(item.logprob))
        top = {_name(tokenizer, token, as_ids): _finite(value) for token, value in item.top}
        top.setdefault(text, _finite(item.logprob))
        tops.append(top)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}, offset
