"""vLLM's parameters beside OpenAI's, through the real client's `extra_body`."""

import asyncio

import httpx
import openai
import pytest
from live_server import serving
from tiny_engine import shared_model

from kvarn.config import CacheConfig, EngineConfig
from kvarn.engine import AsyncLLM, build_engine
from kvarn.testing import byte_tokenizer

MESSAGES = [{"role": "user", "content": "Hello!"}]
LETTERS = list(range(97, 123))


def chat(client, *, stream=False, messages=MESSAGES, logprobs=None, n=None, **extra):
    options = {"logprobs": logprobs, "n": n, **({"stream": True} if stream else {})}
    return client.chat.completions.create(
        model="served", messages=messages, temperature=0, max_tokens=12,
        **{name: value for name, value in options.items() if value is not None},
        extra_body={"ignore_eos": True, **extra},
    )  # fmt: skip


def complete(client, prompt="once upon", *, stream=False, **extra):
    body = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, **extra}
    return client.completions.create(model="served", prompt=prompt, stream=stream, extra_body=body)


def test_allowed_token_ids_and_bad_words(client):
    free = complete(client, allowed_token_ids=LETTERS).choices[0].text
    assert len(free) == 12 and set(free.encode()) <= set(LETTERS)
    word = free[3:6]
    bound = complete(client, allowed_token_ids=LETTERS, bad_words=[word]).choices[0].text
    assert bound[:5] == free[:5] and word not in bound
    answer = chat(client, allowed_token_ids=LETTERS, bad_words=[chr(c) for c in LETTERS if c != 113])
    assert answer.choices[0].message.content == "q" * 12


def test_token_ids_of_a_chat(client, llm):
    prompt = llm.tokenizer.encode_chat(MESSAGES)
    whole = chat(client, return_token_ids=True, n=2)
    assert whole.prompt_token_ids == prompt
    ids = [choice.token_ids for choice in whole.choices]
    assert ids[0] == ids[1] and len(ids[0]) == 12
    assert llm.tokenizer.decode(ids[0]) == whole.choices[0].message.content
    chunks = list(chat(client, return_token_ids=True, n=2, stream=True))
    assert chunks[0].prompt_token_ids == prompt
    assert not any(getattr(chunk, "prompt_token_ids", None) for chunk in chunks[1:])
    streamed = [[], []]
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += getattr(choice, "token_ids", None) or []
    assert streamed == ids
    assert not hasattr(chat(client), "prompt_token_ids")


def test_token_ids_of_completions(client):
    whole = complete(client, ["one", "two"], return_token_ids=True)
    assert [bytes(choice.prompt_token_ids) for choice in whole.choices] == [b"one", b"two"]
    assert [len(choice.token_ids) for choice in whole.choices] == [12, 12]
    prompts, streamed = [[], []], [[], []]
    for chunk in complete(client, ["one", "two"], return_token_ids=True, stream=True):
        for choice in chunk.choices:
            prompts[choice.index] += choice.prompt_token_ids or []
            streamed[choice.index] += choice.token_ids
    assert [bytes(prompt) for prompt in prompts] == [b"one", b"two"]
    assert streamed == [choice.token_ids for choice in whole.choices]


def test_ids_of_tokens_that_are_no_whole_text_come_as_they_are_made(client, llm):
    """Text may be held back, ids are not."""
    bias = {str(b"\xc3"[0]): 100}
    chunks = list(complete(client, return_token_ids=True, logit_bias=bias, stream=True))
    assert [token for chunk in chunks for token in chunk.choices[0].token_ids] == [0xC3] * 12


def test_tokens_as_ids(client):
    plain = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    named = chat(client, logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True).choices[0].logprobs.content
    assert [item.token for item in named] == [f"token_id:{item.bytes[0]}" for item in plain]
    assert named[0].top_logprobs[1].token == f"token_id:{plain[0].top_logprobs[1].bytes[0]}"
    said = complete(client, logprobs=2, return_tokens_as_token_ids=True, return_token_ids=True).choices[0]
    assert said.logprobs.tokens == [f"token_id:{token}" for token in said.token_ids]
    assert all(name.startswith("token_id:") for top in said.logprobs.top_logprobs for name in top)


def test_prompts_are_truncated_from_the_left(client, llm):
    short = complete(client, "upon")
    assert complete(client, "once upon", truncate_prompt_tokens=4).choices[0].text == short.choices[0].text
    cut = complete(client, [list(b"once upon"), list(b"so upon")], truncate_prompt_tokens=4, return_token_ids=True)
    assert [bytes(choice.prompt_token_ids) for choice in cut.choices] == [b"upon"] * 2
    assert cut.usage.prompt_tokens == 8
    assert complete(client, "upon", truncate_prompt_tokens=400).choices[0].text == short.choices[0].text
    long = "x" * (llm.max_model_len + 50)
    with pytest.raises(openai.BadRequestError, match="it may have at most"):
        complete(client, long)
    assert complete(client, long, truncate_prompt_tokens=-1).usage.prompt_tokens == llm.max_model_len - 12
    assert chat(client, truncate_prompt_tokens=5, return_token_ids=True).prompt_token_ids == list(b"tant:")


@pytest.mark.parametrize("wrong", [0, -2, 1.5])
def test_other_truncations_are_refused(client, wrong):
    with pytest.raises(openai.BadRequestError, match="truncate_prompt_tokens") as found:
        complete(client, truncate_prompt_tokens=wrong)
    assert found.value.param == "truncate_prompt_tokens"


def test_the_id_of_an_answer(client):
    assert chat(client, request_id="mine-1").id == "chatcmpl-mine-1"
    assert {chunk.id for chunk in complete(client, request_id="a:b", stream=True)} == {"cmpl-a:b"}
    streams = [complete(client, request_id="twice", stream=True) for _ in range(2)]
    assert [len([*stream]) > 0 for stream in streams] == [True, True], "others may have the same"
    for wrong in ("", "x" * 65, "new\nline", "å"):
        with pytest.raises(openai.BadRequestError) as found:
            chat(client, request_id=wrong)
        assert found.value.param == "request_id"


def test_usage_in_every_event(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    for ask in (chat, complete):
        told = 0
        for chunk in ask(client, stream=True, stream_options=options, return_token_ids=True):
            told += sum(len(getattr(choice, "token_ids", None) or ()) for choice in chunk.choices)
            assert chunk.usage.completion_tokens == told
        assert told == 12


def test_spaces_between_special_tokens_are_never_put_there(client):
    texts = [complete(client, spaces_between_special_tokens=value).choices[0].text for value in (True, False)]
    assert texts[0] == texts[1] == complete(client).choices[0].text


@pytest.fixture(scope="module")
def documented():
    """The URL of a model whose template has a place for documents."""
    template = (
        "{% for document in documents or [] %}[{{ document.title }}: {{ document.text }}]{% endfor %}"
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    config = EngineConfig(threads=1, cache=CacheConfig(num_blocks=64))
    llm = AsyncLLM(build_engine(shared_model("llama", 0), byte_tokenizer(chat_template=template), config, name="tiny"))
    with serving(llm) as url:
        yield url
    asyncio.run(llm.close())


def test_documents_go_to_the_template(documented, url):
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "return_token_ids": True}
    papers = [{"title": "a", "text": "b"}, {"title": "c", "text": "<eos>"}]
    answer = httpx.post(f"{documented}/v1/chat/completions", json={**body, "documents": papers}).json()
    assert bytes(answer["prompt_token_ids"]) == b"[a: b][c: <eos>]x", "special tokens are text in them"
    refused = httpx.post(f"{url}/v1/chat/completions", json={**body, "documents": papers})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "documents"
    assert httpx.post(f"{url}/v1/chat/completions", json={**body, "documents": []}).status_code == 200


def test_prompt_logprobs(client):
    said = chat(client, prompt_logprobs=2).prompt_logprobs
    prompt = b"user: Hello!\nassistant:"
    assert said[0] is None and len(said) == len(prompt)
    for byte, told in zip(prompt[1:], said[1:], strict=True):
        assert 2 <= len(told) <= 3
        own = told[str(byte)]
        assert own["decoded_token"] == chr(byte) and own["logprob"] <= 0
        assert sorted(item["rank"] for item in told.values())[:2] == [1, 2]
    whole = complete(client, ["one", "two"], prompt_logprobs=0, n=2)
    assert [len(choice.prompt_logprobs) for choice in whole.choices] == [3] * 4
    assert [list(told) for told in whole.choices[2].prompt_logprobs[1:]] == [["119"], ["111"]]


def test_echo_with_logprobs(client):
    plain = complete(client, "once upon", logprobs=2).choices[0]
    prompt = complete(client, "once upon", prompt_logprobs=2).choices[0].prompt_logprobs
    echoed = complete(client, "once upon", logprobs=2, echo=True).choices[0]
    said = echoed.logprobs
    assert echoed.text == "once upon" + plain.text
    assert said.tokens == [*"once upon", *plain.logprobs.tokens]
    assert said.text_offset[:10] == list(range(10))
    assert said.token_logprobs[0] is None and said.top_logprobs[0] is None
    of_prompt = [told[str(byte)]["logprob"] for byte, told in zip(b"nce upon", prompt[1:], strict=True)]
    assert said.token_logprobs[1:9] == of_prompt
    assert said.token_logprobs[9:] == plain.logprobs.token_logprobs
    assert said.top_logprobs[9:] == plain.logprobs.top_logprobs
    tokens, offsets = [], []
    for chunk in complete(client, "once upon", logprobs=2, echo=True, stream=True):
        for choice in chunk.choices:
            tokens += choice.logprobs.tokens
            offsets += choice.logprobs.text_offset
    assert (tokens, offsets) == (said.tokens, said.text_offset)


def test_nothing_but_the_prompt(client):
    """What evaluation harnesses ask for."""
    options = {"max_tokens": 0, "echo": True, "logprobs": 1}
    whole = complete(client, ["one", "two"], **options)
    assert [choice.text for choice in whole.choices] == ["one", "two"]
    assert [choice.finish_reason for choice in whole.choices] == ["length"] * 2
    assert whole.choices[1].logprobs.tokens == ["t", "w", "o"]
    assert whole.usage.completion_tokens == 0 and whole.usage.prompt_tokens == 6
    chunks = list(complete(client, ["one", "two"], **options, stream=True, stream_options={"include_usage": True}))
    assert sorted(choice.text for chunk in chunks for choice in chunk.choices) == ["one", "two"]
    assert chunks[-1].usage.completion_tokens == 0
    assert complete(client, "one", max_tokens=0, echo=True).choices[0].logprobs is None


def test_the_best_of_several(client):
    drawn = {"temperature": 1.0, "seed": 5, "max_tokens": 10}
    every = complete(client, ["one", "two"], **drawn, n=6, logprobs=0)
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in every.choices]
    best = complete(client, ["one", "two"], **drawn, n=2, best_of=6)
    for prompt in range(2):
        own = range(6 * prompt, 6 * prompt + 6)
        expected = sorted(own, key=means.__getitem__, reverse=True)[:2]
        told = best.choices[2 * prompt : 2 * prompt + 2]
        assert [choice.text for choice in told] == [every.choices[place].text for place in expected]
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in best.choices)
    assert best.usage.completion_tokens == every.usage.completion_tokens


def test_beam_search(client, llm):
    greedy = complete(client, max_tokens=8, ignore_eos=False)
    one = complete(client, max_tokens=8, ignore_eos=False, use_beam_search=True)
    assert one.choices[0].text == greedy.choices[0].text
    options = {"use_beam_search": True, "best_of": 4, "n": 2, "max_tokens": 8, "return_token_ids": True}
    found = complete(client, ["one", "two"], **options)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert all(choice.finish_reason == "length" and len(choice.token_ids) == 8 for choice in found.choices)
    assert found.usage.completion_tokens == 32
    whole = [tuple(f"{prompt}".encode()) + tuple(choice.token_ids)
             for prompt, choice in zip(["one", "one", "two", "two"], found.choices, strict=True)]
    echoed = complete(client, [list(ids) for ids in whole], echo=True, logprobs=0, max_tokens=0).choices
    sums = [sum(choice.logprobs.token_logprobs[3:]) for choice in echoed]
    assert sums[0] >= sums[1] and sums[2] >= sums[3], "the best first"
    spoken = chat(client, n=2, use_beam_search=True, best_of=3, return_token_ids=True)
    assert len({tuple(choice.token_ids) for choice in spoken.choices}) == 2
    assert llm.stats().running == 0
