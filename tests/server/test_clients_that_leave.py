"""Whenever a client goes, its work ends before the next step, and all it held is free.

The engine stands still inside a step until the server is done with the request, so nothing depends on who is faster.
"""

import threading

import httpx
import pytest
from gated_engine import PATIENCE, gated_llm
from live_server import posted, serving, wait_until

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}


def check_that_all_is_free(llm):
    wait_until(lambda: llm.stats().free_blocks == llm.stats().num_blocks)
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.queued) == (0, 0, 0)


@pytest.mark.parametrize("n", [1, 8])
def test_in_the_middle_of_a_stream(n):
    ended = threading.Semaphore(0)
    with gated_llm() as (llm, gate), serving(llm, ended) as url:
        with posted(url, COMPLETIONS, {**LONG, "n": n, "stream": True}) as connection:
            gate.stand_in_step(3)
            assert connection.getresponse().readline().startswith(b"data: ")
            assert llm.stats().running == n
        assert ended.acquire(timeout=PATIENCE)
        gate.finish_step()
        check_that_all_is_free(llm)
        assert gate.begun == 3


@pytest.mark.parametrize("body", [LONG, {**LONG, "n": 8}, {**LONG, "prompt": ["x", "y", "z"]}])
def test_in_the_middle_of_a_whole_answer(body):
    ended = threading.Semaphore(0)
    with gated_llm() as (llm, gate), serving(llm, ended) as url:
        with posted(url, COMPLETIONS, body):
            gate.stand_in_step(3)
            assert llm.stats().free_blocks < llm.stats().num_blocks
        assert ended.acquire(timeout=PATIENCE)
        gate.finish_step()
        check_that_all_is_free(llm)
        assert gate.begun == 3


@pytest.mark.parametrize("stream", [True, False])
def test_while_its_prompt_is_computed(stream):
    ended = threading.Semaphore(0)
    with gated_llm(max_num_batched_tokens=16) as (llm, gate), serving(llm, ended) as url:
        with posted(url, COMPLETIONS, {**LONG, "prompt": "x" * 100, "stream": stream}):
            gate.stand_in_step(3)
            assert llm.stats().running == 1
        assert ended.acquire(timeout=PATIENCE)
        gate.finish_step()
        check_that_all_is_free(llm)
        assert gate.begun == 3
        assert llm.stats().generated_tokens == 0


@pytest.mark.parametrize("stream", [True, False])
def test_while_its_prompt_waits_for_others(stream):
    ended = threading.Semaphore(0)
    with gated_llm(max_num_seqs=1) as (llm, gate), serving(llm, ended) as url:
        with posted(url, COMPLETIONS, {**LONG, "max_tokens": 5}) as first:
            gate.stand_in_step(2)
            with posted(url, COMPLETIONS, {**LONG, "stream": stream}):
                wait_until(lambda: llm.stats().queued == 1)
            assert ended.acquire(timeout=PATIENCE)
            gate.open()
            assert first.getresponse().status == 200
        check_that_all_is_free(llm)
        assert llm.stats().generated_tokens == 5


def test_those_who_stay_get_their_whole_answer():
    ended = threading.Semaphore(0)
    body = {**LONG, "prompt": "stay", "max_tokens": 12, "temperature": 0}
    with gated_llm() as (llm, gate), serving(llm, ended) as url:
        with posted(url, COMPLETIONS, body) as stays:
            gate.stand_in_step(2)
            with posted(url, COMPLETIONS, {**LONG, "stream": True}):
                wait_until(lambda: llm.stats().queued == 1)
                gate.stand_in_step(4)
                assert llm.stats().running == 2
            assert ended.acquire(timeout=PATIENCE)
            gate.open()
            answer = stays.getresponse().read()
        quiet = httpx.post(url + COMPLETIONS, json=body)
        assert httpx.Response(200, content=answer).json()["choices"] == quiet.json()["choices"]
        check_that_all_is_free(llm)
