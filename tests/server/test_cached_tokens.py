"""What a client is told of the prefix cache, and how it keeps others out."""

import httpx
import pytest

TEXT = "Once upon a time there stood a mill by the river, and"
HELLO = [{"role": "user", "content": TEXT}]
ROUTES = [("completions", {"prompt": TEXT}), ("chat/completions", {"messages": HELLO})]
COUNTERS = ("kvarn:prefix_cache_queries_total", "kvarn:prefix_cache_hits_total")


def usage(url, route, body, **fields):
    response = httpx.post(f"{url}/v1/{route}", json={**body, "max_tokens": 3, "ignore_eos": True, **fields}, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["usage"]


@pytest.mark.parametrize(("route", "body"), ROUTES)
def test_usage_says_what_was_cached_for_each_salt(url, route, body):
    for salt in (f"{route} mine", f"{route} other"):
        first = usage(url, route, body, cache_salt=salt)
        assert first["prompt_tokens_details"]["cached_tokens"] == 0
        for n in (1, 3):
            again = usage(url, route, body, cache_salt=salt, n=n)
            assert again["prompt_tokens"] == first["prompt_tokens"]
            assert again["prompt_tokens_details"]["cached_tokens"] == first["prompt_tokens"] - 1


def test_prompts_of_one_request_share_what_they_begin_with(url):
    texts = [TEXT + end for end in (" a", " b", " c")]
    counted = usage(url, "completions", {"prompt": texts}, cache_salt="three")
    assert counted["prompt_tokens_details"]["cached_tokens"] >= 2 * (len(TEXT) // 16 * 16)


def test_the_metrics_count_tokens(url):
    def counters():
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return [float(line.split()[-1]) for line in lines if line.startswith(COUNTERS)]

    before = counters()
    for _ in range(2):
        counted = usage(url, "completions", {"prompt": TEXT}, cache_salt="metrics")
    gained = [after - earlier for after, earlier in zip(counters(), before, strict=True)]
    assert gained == [2 * counted["prompt_tokens"], counted["prompt_tokens"] - 1]
