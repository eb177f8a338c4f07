"""From a file to an engine: what is read from it, what it is sized to, and what is refused before it is read."""

import asyncio

import pytest

from kvarn.config import CacheConfig, EngineConfig
from kvarn.engine import LLM, AsyncLLM, load_engine, make_backend
from kvarn.errors import CapacityError, ConfigError, ModelFileError
from kvarn.request import Request, SamplingParams
from kvarn.tensors import DType
from kvarn.testing import write_tiny_gguf

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=12)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny-llama.v2.gguf", dtype=DType.Q8_0)


def test_a_file_is_served_as_it_says(path):
    with LLM(str(path), num_blocks=40, threads=1) as llm:
        assert llm.model_name == "tiny-llama.v2"
        assert llm.model_config.vocab_size == 259
        assert llm.max_model_len == 512
        assert llm.stats().num_blocks == 40
        assert llm.load_times is not None
        assert min(llm.load_times.open, llm.load_times.tokenizer, llm.load_times.weights) > 0
        completion = llm.chat([{"role": "user", "content": "hi"}], GREEDY)
        assert completion.prompt_token_ids == tuple(b"user: hi\nassistant:")
        assert len(completion.token_ids) == 12


def test_the_reference_serves_a_file_too(tmp_path):
    """It reads weights late: the file must stay open as long as the engine."""
    path = str(write_tiny_gguf(tmp_path / "tiny.gguf"))
    settings = {"num_blocks": 40, "kv_cache_dtype": "float32"}
    with LLM(path, backend="reference", **settings) as reference, LLM(path, **settings) as llm:
        (expected,) = reference.generate("The mill", GREEDY)
        (completion,) = llm.generate("The mill", GREEDY)
    assert completion.token_ids == expected.token_ids


def test_both_fronts_load(path):
    async def main():
        async with AsyncLLM.from_model(str(path), EngineConfig(cache=CacheConfig(num_blocks=40))) as llm:
            stream = llm.generate(Request("a", tuple(llm.tokenizer.encode("hi")), GREEDY))
            return [token async for output in stream for token in output.outputs[0].token_ids]

    tokens = asyncio.run(main())
    with LLM(str(path), num_blocks=40) as llm:
        assert list(llm.generate("hi", GREEDY)[0].token_ids) == tokens


def test_the_ends_of_text_are_the_files(tmp_path):
    """The first token that a greedy model says is declared its end of text, and the model stops there."""
    path = write_tiny_gguf(tmp_path / "a.gguf")
    with LLM(str(path), num_blocks=40) as llm:
        first, *_ = llm.generate("x", GREEDY)[0].token_ids
    other = write_tiny_gguf(tmp_path / "b.gguf", metadata={"tokenizer.ggml.eos_token_id": first})
    with LLM(str(other), num_blocks=40) as llm:
        (completion,) = llm.generate("x", SamplingParams(temperature=0.0))
    assert completion.token_ids == (first,)
    assert completion.finish_reason.value == "stop"


def test_what_does_not_fit_is_refused_before_anything_is_allocated(path):
    with pytest.raises(CapacityError, match="num_blocks may be at most"):
        LLM(str(path), num_blocks=10**12)
    with pytest.raises(CapacityError, match="max_model_len 400 needs 25 blocks"):
        LLM(str(path), num_blocks=10, max_model_len=400)
    with pytest.raises(ConfigError, match="max_model_len must be at most 512"):
        LLM(str(path), max_model_len=513)


def test_wrong_names_are_clear_errors(tmp_path):
    with pytest.raises(ConfigError, match="backend must be one of cpu, cuda, reference"):
        make_backend("tpu")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ModelFileError, match=r"broken\.gguf"):
        load_engine(str(tmp_path / "broken.gguf"), EngineConfig())
