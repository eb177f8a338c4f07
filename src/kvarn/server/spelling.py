"""`Spelling`: what another API calls the parameters of a chat completion, for errors."""

from __future__ import annotations

import re

from kvarn.server.errors import ApiError

Spelling = tuple[tuple[re.Pattern[str], str], ...]
"""Patterns of paths, and what they are replaced by. What is replaced matches no more."""
AS_OPENAI: Spelling = ()


def respelt(error: ApiError, spelling: Spelling) -> ApiError:
    """The error with its parameter, in the message too, as the client spelt it."""
    for pattern, name in spelling:
        if error.param is not None and pattern.search(error.param):
            new = pattern.sub(name, error.param)
            message = error.message.replace(error.param, new, 1)
            error = ApiError(error.status, message, param=new, code=error.code, headers=error.headers)
    return error
