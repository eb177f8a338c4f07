"""Engines over tiny random models whose tokens are bytes, and the way to watch what they do."""

import functools

from kvarn.config import CacheConfig, EngineConfig, SchedulerConfig
from kvarn.engine import EngineCore, build_engine
from kvarn.request import Request, RequestOutput, SamplingParams
from kvarn.testing import tiny_model
from kvarn.text import Tokenizer
from kvarn.text.gguf import vocabulary_from_gguf

BOS, EOS = 256, 257


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """Tokens 0 … 255 are bytes, then BOS, EOS and one spare: the vocabulary of the tiny models."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    characters = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*characters, "<bos>", "<eos>", "<spare>"],
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 3,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
    }
    return Tokenizer(vocabulary_from_gguf(metadata, "bytes"))


@functools.cache
def shared_model(family, seed):
    return tiny_model(family, seed=seed)


def tiny_engine(
    *, family="llama", seed=0, backend="reference", max_model_len=None, max_num_seqs=8, max_num_batched_tokens=64,
    max_num_queued_requests=64, num_blocks=64, block_size=16, dtype="float32", threads=1,
):
    config = EngineConfig(
        max_model_len=max_model_len,
        backend=backend,
        threads=threads,
        cache=CacheConfig(block_size=block_size, num_blocks=num_blocks, dtype=dtype),
        scheduler=SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_num_queued_requests),
    )
    return build_engine(shared_model(family, seed), byte_tokenizer(), config, name="tiny")


def run_core(core: EngineCore, requests: list[Request]) -> dict[str, list[RequestOutput]]:
    """Adds all requests and steps until none is left."""
    outputs: dict[str, list[RequestOutput]] = {}
    for request in requests:
        core.add(request)
    for _ in range(100_000):
        if not core.has_work():
            return outputs
        for event in core.step():
            assert isinstance(event, RequestOutput), event
            outputs.setdefault(event.request_id, []).append(event)
    raise AssertionError("the work does not end")


def tokens_of(outputs: list[RequestOutput], index: int = 0) -> list[int]:
    return [token for o in outputs for part in o.outputs if part.index == index for token in part.token_ids]


def text_of(outputs: list[RequestOutput], index: int = 0) -> str:
    return "".join(part.text for o in outputs for part in o.outputs if part.index == index)


def request(name: str, prompt: str | tuple[int, ...], **sampling) -> Request:
    ids = tuple(prompt.encode()) if isinstance(prompt, str) else prompt
    return Request(name, ids, SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 8, **sampling}))
