"""Tiny engines for the tests of this folder."""

import pytest
from tiny_engine import tiny_engine

from kvarn.engine import LLM, AsyncLLM


@pytest.fixture
def make_llm():
    """LLMs over tiny random models; closed at the end of the test."""
    made = []

    def make(**settings):
        made.append(LLM.from_engine(tiny_engine(**settings)))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def make_async_llm():
    """AsyncLLMs over tiny random models, for use in one `asyncio.run`; close them there."""
    return lambda **settings: AsyncLLM(tiny_engine(**settings))
