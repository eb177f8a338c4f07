"""/openapi.json is true: every route is in it, what it describes is what is answered, and nothing made up breaks it."""

import asyncio
import importlib.util
import sys
from pathlib import Path

import httpx
import jsonschema
import pytest
from live_server import serving
from tiny_engine import tiny_engine

from kvarn.engine import AsyncLLM
from kvarn.server import create_app
from kvarn.server.openapi.operations import OPERATIONS

pytestmark = pytest.mark.long

BENCH = Path(__file__).parents[2] / "bench" / "fuzz_api.py"
HELLO = [{"role": "user", "content": "Hello!"}]
CASES = 200


@pytest.fixture(scope="module")
def document():
    return create_app(None).openapi()


@pytest.fixture(scope="module")
def fuzzing():
    """The functions of bench/fuzz_api.py."""
    spec = importlib.util.spec_from_file_location("fuzz_api", BENCH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_api"] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fuzz_api"]


def test_every_route_says_what_it_takes_and_answers(document):
    assert set(document["paths"]) == set(OPERATIONS)
    for methods in document["paths"].values():
        for operation in methods.values():
            assert "default" in operation["responses"] and "422" not in operation["responses"]


def test_the_document_is_one_for_the_public_tools(url):
    answered = httpx.get(f"{url}/openapi.json").json()
    jsonschema.Draft202012Validator.check_schema({"$defs": answered["components"]["schemas"]})
    assert answered["openapi"].startswith("3.1")


BODIES = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 4, "logprobs": True, "top_logprobs": 2},
    "/v1/chat/completions/input_tokens": {"messages": HELLO},
    "/v1/completions": {"prompt": "once", "max_tokens": 4, "logprobs": 2},
    "/v1/embeddings": {"input": ["a", "b"]},
    "/v1/responses": {"input": "once", "max_output_tokens": 4},
    "/v1/messages": {"messages": HELLO, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/tokenize": {"prompt": "once"},
    "/detokenize": {"tokens": [97]},
}


@pytest.mark.parametrize("path", [path for path, operation in OPERATIONS.items() if operation.body])
def test_requests_and_answers_fit_their_schemas(url, document, path):
    operation = document["paths"][path]["post"]
    validate(document, operation["requestBody"]["content"]["application/json"]["schema"], BODIES[path])
    response = httpx.post(url + path, json=BODIES[path])
    assert response.status_code == 200, response.text
    validate(document, operation["responses"]["200"]["content"]["application/json"]["schema"], response.json())
    refused = httpx.post(url + path, json={"nonsense": 1})
    assert refused.status_code == 400
    validate(document, operation["responses"]["400"]["content"]["application/json"]["schema"], refused.json())
    with pytest.raises(jsonschema.ValidationError):
        validate(document, operation["requestBody"]["content"]["application/json"]["schema"], {"nonsense": 1})


def validate(document, schema, value):
    jsonschema.validate(value, {**schema, "components": document["components"]})


def test_made_up_requests(fuzzing):
    llm = AsyncLLM(tiny_engine(backend="cpu", dtype="float16", max_model_len=96, max_num_seqs=16, num_blocks=256))
    with serving(llm) as url:
        rows = fuzzing.fuzz(url, CASES, workers=1)
    asyncio.run(llm.close())
    assert sum(row.cases for row in rows) > 0.8 * CASES
    failures = [failure for row in rows for failure in row.failures]
    assert not failures, failures[0]
    assert not any(row.count(5) for row in rows)
    assert all(row.count(2) for row in rows if "name" not in row.label), "each route has answered something"


def test_a_server_error_is_found(fuzzing):
    with serving(None) as url:
        rows = fuzzing.fuzz(url, 20, only="/v1/embeddings", workers=1)
    assert rows[0].count(5) == rows[0].cases
    assert rows[0].failures
