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


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": _text(tokenizer, token), "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        {**entry(item.token_id, item.logprob), "top_logprobs": [entry(*alternative) for alternative in item.top]}
        for item in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """`choices[].logprobs` of a completion. offset: characters of the answer before these tokens."""
    tokens, offsets, tops = [], [], []
    for item in logprobs:
        text = _text(tokenizer, item.token_id)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        top = {_text(tokenizer, token): _finite(value) for token, value in item.top}
        top.setdefault(text, _finite(item.logprob))
        tops.append(top)
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(item.logprob) for item in logprobs],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
