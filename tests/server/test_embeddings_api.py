"""The `openai` client gets embeddings: what the engine pools, as unit vectors, in each of its forms."""

import asyncio
import math
import statistics
import threading

import httpx
import openai
import pytest
from gated_engine import PATIENCE, gated_llm
from live_server import posted, serving, wait_until
from test_bad_requests import check_shape

from kvarn.request import Pooling, Request, SamplingParams

TEXT = "The mill stands by the river."


def embed(client, given=TEXT, **options):
    return client.embeddings.create(model="served", input=given, **options)


def vector(client, given=TEXT, **options):
    return embed(client, given, **options).data[0].embedding


def pooled(llm, pooling, text=TEXT):
    """What the engine says, made a unit vector."""

    async def run():
        ids = tuple(llm.tokenizer.encode(text, add_special_tokens=True))
        request = Request("mine", ids, SamplingParams(max_tokens=1), pooling=pooling)
        return [output async for output in llm.generate(request)][-1].embedding

    values = asyncio.run(run())
    length = math.hypot(*values)
    return [value / length for value in values]


@pytest.mark.parametrize("pooling", list(Pooling))
def test_a_text(client, llm, pooling):
    answer = embed(client, extra_body={"pooling": pooling.value})
    assert (answer.object, answer.model, answer.data[0].object, answer.data[0].index) == (
        "list", "served", "embedding", 0,
    )  # fmt: skip
    assert answer.data[0].embedding == pytest.approx(pooled(llm, pooling), abs=1e-6)
    count = len(llm.tokenizer.encode(TEXT, add_special_tokens=True))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == count


def test_numbers_and_base64_are_the_same(client, url):
    # The client asks for base64 unless told otherwise, and gives numbers all the same.
    assert vector(client) == vector(client, encoding_format="float")
    body = {"input": TEXT, "encoding_format": "base64"}
    assert isinstance(httpx.post(f"{url}/v1/embeddings", json=body).json()["data"][0]["embedding"], str)


def test_inputs_in_every_form(client):
    many = [f"text number {n}" for n in range(40)]
    single = [vector(client, text) for text in many]
    assert [item.embedding for item in embed(client, many).data] == single
    assert [item.index for item in embed(client, many).data] == list(range(40))
    ids = list(b"text number 3")
    plain = vector(client, "text number 3", extra_body={"add_special_tokens": False})
    assert vector(client, ids) == plain
    assert [item.embedding for item in embed(client, [ids, ids]).data] == [plain, plain]


def test_fewer_dimensions_are_the_first_ones_as_a_unit_vector(client, llm):
    whole, short = vector(client), vector(client, dimensions=8)
    length = math.hypot(*whole[:8])
    assert short == pytest.approx([value / length for value in whole[:8]], abs=1e-6)
    assert math.hypot(*vector(client, dimensions=llm.model_config.hidden_size)) == pytest.approx(1, abs=1e-6)


def test_the_servers_way_of_pooling(llm):
    with serving(llm, pooling=Pooling.LAST) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        last = client.embeddings.create(model="tiny", input=TEXT).data[0].embedding
    assert last == pytest.approx(pooled(llm, Pooling.LAST), abs=1e-6)


BAD = [
    ({}, "input"),
    ({"input": []}, "input"),
    ({"input": ""}, "input"),
    ({"input": ["a", ""]}, "input"),
    ({"input": [[]]}, "input"),
    ({"input": [1, "a"]}, "input"),
    ({"input": ["a"] * 2049}, "input"),
    ({"input": "x" * 600}, "input"),
    ({"input": [99999]}, "input"),
    ({"input": "a", "dimensions": 0}, "dimensions"),
    ({"input": "a", "dimensions": 10**6}, "dimensions"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ({"input": "a", "pooling": "max"}, "pooling"),
    ({"input": "a", "cache_salt": ""}, "cache_salt"),
    ({"input": "a", "stream": True}, "stream"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_what_is_wrong_is_named(url, case):
    body, param = BAD[case]
    body = {"add_special_tokens": False, **body}
    response = httpx.post(f"{url}/v1/embeddings", json=body)
    check_shape(response, 400)
    assert response.json()["error"]["param"] == param


def test_a_client_that_leaves_is_forgotten():
    ended = threading.Semaphore(0)
    with gated_llm(max_num_seqs=2, embeddings=True) as (llm, gate), serving(llm, ended) as url:
        with posted(url, "/v1/embeddings", {"input": ["a", "b"] * 500}):
            gate.stand_in_step(3)
            wait_until(lambda: llm.stats().waiting > 2)
            assert llm.stats().waiting <= 32, "the others are not in the queue yet"
        assert ended.acquire(timeout=PATIENCE)
        gate.open()
        wait_until(lambda: llm.stats().running == 0 and llm.stats().waiting == 0)
        assert llm.stats().prompt_tokens < 500
        assert llm.stats().free_blocks == llm.stats().num_blocks


def test_alike_texts_have_alike_vectors(client):
    """Of the tiny random model only so much can be said: a text is nearest to itself with a letter changed."""
    texts = ["the river turns the wheel", "the river turns the wheek", "QUITE ANOTHER MATTER 123"]
    one, near, far = (item.embedding for item in embed(client, texts).data)
    assert statistics.correlation(one, near) > statistics.correlation(one, far)
