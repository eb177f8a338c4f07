"""The real `openai` client gets what OpenAI's API promises, whole and streaming."""

import concurrent.futures
import json
import re
from importlib import resources

import httpx
import openai
import pytest

from kvarn.server.routes.pages import PAGES

GREEDY = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]


def chat(client, **options):
    return client.chat.completions.create(**{"model": "served", "messages": MESSAGES, **GREEDY, **options})


def complete(client, prompt="once upon", **options):
    return client.completions.create(model="served", prompt=prompt, **{**GREEDY, **options})


def test_models(client):
    assert [m.id for m in client.models.list()] == ["served", "tiny"]
    assert client.models.retrieve("served").object == "model"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("other")


def test_the_model_answers_by_each_of_its_names(client):
    for name in ("served", "tiny"):
        assert client.completions.create(model=name, prompt="x", max_tokens=1).model == name
    assert chat(client, model="tiny").model == "tiny"


def test_a_whole_chat_completion(client):
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.model == "served"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_stream_says_the_same(client):
    whole = chat(client).choices[0].message.content
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_a_stream_without_usage_ends_with_done(url):
    body = {"messages": MESSAGES, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line[6:]) for line in lines[:-1])


def test_n_answers_differ_and_a_seed_repeats_them(client):
    options = {"n": 3, "temperature": 1.0, "seed": 11}
    first, again = (sorted((c.index, c.message.content) for c in chat(client, **options).choices) for _ in range(2))
    assert first == again
    assert len({text for _, text in first}) == 3
    texts = ["", "", ""]
    for chunk in chat(client, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert list(enumerate(texts)) == first


def test_stop_strings_end_the_answer_and_stay_out_of_it(client):
    text = complete(client, max_tokens=40).choices[0].text
    stop = text[10:13]
    answer = complete(client, max_tokens=40, stop=[stop, "never said"]).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.text == text[: text.index(stop)]
    streamed = complete(client, max_tokens=40, stop=stop, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == answer.text


def test_chat_logprobs(client):
    answer = chat(client, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 12
    for item in content:
        assert item.logprob <= 0
        assert len(item.top_logprobs) == 3
        assert item.top_logprobs[0].logprob == pytest.approx(item.logprob)
    text = b"".join(bytes(item.bytes) for item in content).decode(errors="replace")
    assert text == answer.choices[0].message.content
    streamed = [c.choices[0].logprobs for c in chat(client, logprobs=True, stream=True) if c.choices]
    assert sum(len(part.content) for part in streamed if part) == 12


def test_completion_logprobs(client):
    answer = complete(client, logprobs=2).choices[0].logprobs
    assert len(answer.tokens) == len(answer.token_logprobs) == len(answer.text_offset) == 12
    assert all(2 <= len(top) <= 3 for top in answer.top_logprobs)


def test_prompts_in_every_form(client):
    texts = [c.text for c in complete(client, ["one", "two"], n=2).choices]
    assert texts[0] == texts[1] == complete(client, "one").choices[0].text
    assert texts[2] == texts[3] == complete(client, "two").choices[0].text
    assert complete(client, list(b"one")).choices[0].text == texts[0]
    assert [c.text for c in complete(client, [list(b"one"), list(b"two")]).choices] == [texts[0], texts[2]]
    streamed = ["", ""]
    for chunk in complete(client, ["one", "two"], stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [texts[0], texts[2]]


def test_echo_puts_the_prompt_before_each_answer(client):
    plain = [c.text for c in complete(client, ["one", "two"], n=2).choices]
    prompts = ["one", "one", "two", "two"]
    expected = [prompt + text for prompt, text in zip(prompts, plain, strict=True)]
    whole = complete(client, ["one", "two"], n=2, echo=True)
    assert [c.text for c in whole.choices] == expected
    assert whole.usage.completion_tokens == 4 * 12
    streamed = ["", "", "", ""]
    for chunk in complete(client, ["one", "two"], n=2, echo=True, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == expected


def test_echo_of_token_ids_is_their_text(client):
    assert complete(client, list("müde".encode()), echo=True).choices[0].text.startswith("müde")


def test_a_stop_string_in_an_echoed_prompt_stops_nothing(client):
    answer = complete(client, "one", echo=True, stop="one").choices[0]
    assert answer.text.startswith("one")
    assert answer.finish_reason == "length"


def test_logit_bias_forces_a_token(client):
    answer = complete(client, logit_bias={"65": 100}, max_tokens=4)
    assert answer.choices[0].text == "AAAA"


def test_both_names_of_the_token_limit(client):
    assert chat(client, max_tokens=openai.NOT_GIVEN, max_completion_tokens=5).usage.completion_tokens == 5


def test_sixteen_streams_at_once_say_what_a_quiet_server_says(client):
    prompts = [f"prompt number {i}" for i in range(16)]
    quiet = [complete(client, p, max_tokens=24).choices[0].text for p in prompts]

    def streamed(prompt):
        return "".join(c.choices[0].text for c in complete(client, prompt, max_tokens=24, stream=True))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(streamed, prompts)) == quiet


def test_health_and_version(url):
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert "version" in httpx.get(f"{url}/version").json()


def test_the_pages_are_self_contained(url):
    folder = resources.files("kvarn.server").joinpath("static")
    assert {entry.name for entry in folder.iterdir()} == set(PAGES.values())
    for path in PAGES:
        file = httpx.get(url + path)
        assert file.status_code == 200
        assert "default-src 'none'" in file.headers["content-security-policy"]
        assert file.headers["content-type"].startswith(("text/", "image/svg"))
        foreign = re.findall(r"https?://(?!www\.w3\.org/2000/svg)\w", file.text)
        assert foreign == []
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", file.text)
        assert not re.search(r" style=| on\w+=|<style|<script>", file.text)


def test_a_page_that_the_browser_has_is_not_sent_again(url):
    tag = httpx.get(f"{url}/static/chat.js").headers["etag"]
    again = httpx.get(f"{url}/static/chat.js", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert httpx.get(f"{url}/static/base.css", headers={"If-None-Match": tag}).status_code == 200
