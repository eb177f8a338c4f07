"""Whether two models speak of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from kvarn.errors import ConfigError


def check_same_vocabulary(target: Sequence[str], draft: Sequence[str], target_name: str, draft_name: str) -> None:
    """Raises ConfigError naming both models and the first token that differs.

    target, draft: how each token is spelt, by id; "" where an id has no token. Vocabularies may be filled up to
    different sizes with such ids.
    """
    if target == draft:
        return
    for token, (ours, theirs) in enumerate(zip_longest(target, draft, fillvalue="")):
        if ours != theirs:
            raise ConfigError(
                f"speculative model: {draft_name} has another vocabulary than {target_name}: token {token} is "
                f"{_named(theirs)} there, {_named(ours)} here"
            )


def _named(token: str) -> str:
    return repr(token) if token else "none"
