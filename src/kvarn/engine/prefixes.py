"""Beginnings of prompts that all tenants share, as the token ids that the prefix cache goes by."""

from __future__ import annotations

from kvarn.cache import BlockPool, RadixPrefixCache, common_length
from kvarn.config import CacheConfig
from kvarn.errors import CapacityError
from kvarn.text import Tokenizer


def shared_prefixes(
    tokenizer: Tokenizer, cache: CacheConfig, num_blocks: int, windows: tuple[int | None, ...] = (None,)
) -> tuple[tuple[int, ...], ...]:
    """What the config declares, texts of system prompts as the tokens that conversations with them begin with.

    windows: of the KV groups that share the `num_blocks`; all of them keep the whole of what is declared.

    Raises CapacityError where their blocks leave none of `num_blocks` to requests, TemplateError where the model's chat
    template takes no system message.
    """
    prefixes = (*cache.shared_prefixes, *(_system_prompt(tokenizer, text) for text in cache.shared_system_prompts))
    taken = RadixPrefixCache(BlockPool(num_blocks, cache.block_size, windows), prefixes).num_reserved
    if taken >= num_blocks:
        raise CapacityError(
            f"the shared prefixes take {taken} blocks of KV cache, but there are {num_blocks}; "
            f"give it more than {taken // len(windows) * cache.block_size} tokens or share less"
        )
    return prefixes


def _system_prompt(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The tokens that all conversations with this system message begin with, whatever the user says."""
    first, second = (
        tokenizer.encode_chat([{"role": "system", "content": text}, {"role": "user", "content": said}])
        for said in ("a", "1")
    )
    return tuple(first[: common_length(first, second)])
