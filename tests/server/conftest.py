"""One tiny model behind one server, for all tests of the API."""

import asyncio

import openai
import pytest
from live_server import serving
from tiny_engine import tiny_engine

from kvarn.engine import AsyncLLM


@pytest.fixture(scope="session")
def llm():
    """An engine over a tiny random llama whose tokens are bytes."""
    engine = AsyncLLM(tiny_engine(backend="cpu", dtype="float16", max_num_seqs=16, num_blocks=256))
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="session")
def url(llm):
    """The server's base URL."""
    with serving(llm, served_model_names=("served",)) as base:
        yield base


@pytest.fixture(scope="session")
def client(url):
    """The real OpenAI client."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made
