"""What is sent and when: the same seed gives the same, and lengths and moments are what was asked for."""

import itertools
import json
import statistics

import pytest

from kvarn.bench.serve.arrivals import Arrivals
from kvarn.bench.serve.client import Target
from kvarn.bench.serve.datasets import FromFile, OfTrace, RandomWords, Sonnet, read_jsonl, read_sharegpt
from kvarn.bench.serve.lengths import Lengths
from kvarn.bench.serve.load import Extent
from kvarn.bench.serve.tokens import TokenScale
from kvarn.errors import ConfigError
from kvarn.traffic import Arrival

ONE = Lengths.parse("x", "64")
SCALE = TokenScale(2.0, 10.0, measured=True)


def first(endless, count):
    return list(itertools.islice(endless, count))


def gaps(kind, count=20_000, **settings):
    times = first(Arrivals(kind, **settings).times(4.0, "seed"), count)
    return [late - early for early, late in itertools.pairwise(times)]


@pytest.mark.parametrize(
    ("kind", "settings", "variation"),
    [
        ("poisson", {}, 1.0),
        ("gamma", {"burstiness": 0.25}, 2.0),
        ("gamma", {"burstiness": 4.0}, 0.5),
        ("constant", {}, 0),
    ],
)
def test_moments_have_their_rate_and_their_variation(kind, settings, variation):
    found = gaps(kind, **settings)
    mean = statistics.fmean(found)
    assert mean == pytest.approx(0.25, rel=0.04)
    assert statistics.pstdev(found) / mean == pytest.approx(variation, rel=0.05, abs=1e-9)


def test_bursts_come_together_at_the_same_rate():
    times = first(Arrivals("burst", burst=10).times(4.0, "seed"), 40_000)
    assert all(len(set(times[begin : begin + 10])) == 1 for begin in range(0, 40_000, 10))
    assert len(set(times)) == 4_000
    assert times[-1] / 40_000 == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("kind", ["poisson", "gamma", "burst", "constant"])
def test_the_same_seed_gives_the_same_moments(kind):
    arrivals = Arrivals(kind, burstiness=0.5)
    assert first(arrivals.times(3.0, "a"), 100) == first(arrivals.times(3.0, "a"), 100)
    if kind != "constant":
        assert first(arrivals.times(3.0, "a"), 100) != first(arrivals.times(3.0, "b"), 100)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Arrivals("often"), "--arrivals must be one of poisson, gamma, burst, constant, not 'often'"),
        (lambda: Arrivals(burstiness=0), "--burstiness must be between"),
        (lambda: Arrivals(burst=0), "--burst must be between"),
        (lambda: Arrivals().times(0, ""), "--rate must be above 0"),
        (lambda: Arrivals().times(float("nan"), ""), "--rate must be above 0"),
        (lambda: Lengths.parse("prompt-tokens", "many"), "--prompt-tokens must be as 256, 64-512 or lognormal:256,0.6"),
        (lambda: Lengths.parse("prompt-tokens", "9-5"), "--prompt-tokens: 9 is more than 5"),
        (lambda: Lengths.parse("prompt-tokens", "0"), "--prompt-tokens must be between 1"),
        (lambda: Lengths.parse("prompt-tokens", "lognormal:5,9"), "the spread must be"),
        (lambda: Lengths.parse("prompt-tokens", "lognormal:nan,1"), "--prompt-tokens must be between 1"),
        (lambda: RandomWords(ONE, ONE, prefixes=3), "--prefixes and --prefix-tokens must be given together"),
        (lambda: Extent(), "give either --requests or --seconds"),
        (lambda: Extent(5, 5.0), "give either --requests or --seconds"),
        (lambda: Extent(requests=0), "--requests must be between 1"),
        (lambda: Extent(seconds=0.0), "--seconds must be above 0"),
        (lambda: Extent(5, warmup=-1.0), "--warmup must be between 0"),
        (lambda: Target("127.0.0.1:8000"), "URL must be a server's base"),
        (lambda: Target("file:///etc"), "URL must be a server's base"),
        (lambda: Target("http://x", endpoint="embeddings"), "--endpoint must be chat or completions"),
        (lambda: Target("http://x", timeout=0), "--timeout must be between"),
        (lambda: Target("http://x", api_key="a\nb"), "--api-key must be printable"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(make, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace(".", r"\.")):
        make()


def test_an_extent_cuts_moments():
    moments = [0.5 * number for number in range(1000)]
    assert list(Extent(seconds=2.0, warmup=1.0).cut(moments)) == [0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert list(Extent(requests=3, warmup=1.0).cut(moments)) == [0, 0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("dataset", [RandomWords(ONE, ONE), Sonnet(ONE, ONE), RandomWords(ONE, ONE, 2, 32)])
def test_the_same_seed_gives_the_same_prompts(dataset):
    assert first(dataset.prompts("a", SCALE), 20) == first(dataset.prompts("a", SCALE), 20)
    assert first(dataset.prompts("a", SCALE), 20) != first(dataset.prompts("b", SCALE), 20)
    assert dataset.sample(17) == dataset.sample(17)
    assert len(dataset.sample(17).split()) == 17


def test_lengths_are_drawn_as_asked():
    dataset = RandomWords(Lengths.parse("x", "100-300"), Lengths.parse("x", "lognormal:64,0.6"))
    prompts = first(dataset.prompts("a", SCALE), 4000)
    tokens = [SCALE.tokens(prompt.text) for prompt in prompts]
    assert min(tokens) >= 99 and max(tokens) <= 301
    assert statistics.fmean(tokens) == pytest.approx(200, rel=0.03)
    assert statistics.fmean(prompt.output_tokens for prompt in prompts) == pytest.approx(64, rel=0.05)
    assert len({prompt.text[:40] for prompt in prompts}) == 4000


def test_prefixes_come_in_turn_and_are_shared():
    prompts = first(RandomWords(ONE, ONE, 3, 32).prompts("a", SCALE), 9)
    beginnings = [prompt.text.split()[:16] for prompt in prompts]
    assert beginnings[0] == beginnings[3] == beginnings[6] != beginnings[1] == beginnings[4]
    assert len({prompt.text for prompt in prompts}) == 9


def test_sonnets_are_whole_lines_after_one_request():
    (prompt,) = first(Sonnet(Lengths.parse("x", "300"), ONE).prompts("a", SCALE), 1)
    request, *lines = prompt.text.splitlines()
    assert request.startswith("Pick as many lines")
    assert 130 <= len(prompt.text.split()) <= 160
    assert all(lines)


def test_sharegpt_asks_first_questions_for_answers_as_long_as_theirs(tmp_path):
    path = tmp_path / "share.json"
    talk = [{"from": "human", "value": "why is it so"}, {"from": "gpt", "value": "because it is"}, {"from": "human"}]
    others = [{"conversations": []}, {"conversations": talk[1:]}, 5, {"conversations": [1, 2]}, {"x": 1}]
    path.write_text(json.dumps([*others, {"conversations": talk}]))
    (prompt,) = first(FromFile(path, read_sharegpt(path), ONE).prompts("a", SCALE), 1)
    assert prompt.text == "why is it so"
    assert prompt.messages == ({"role": "user", "content": "why is it so"},)
    assert prompt.output_tokens == 6


def test_lines_of_json_ask_what_they_say(tmp_path):
    path = tmp_path / "prompts.jsonl"
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    lines = [{"prompt": "one"}, {"question": "two", "max_tokens": 9}, {"turns": ["three", "x"]}, {"messages": talk}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    dataset = FromFile(path, read_jsonl(path), ONE, max_output_tokens=7)
    prompts = {prompt.text: prompt for prompt in first(dataset.prompts("a", SCALE), 4)}
    assert set(prompts) == {"one", "two", "three", "s\nu"}
    assert prompts["two"].output_tokens == 7
    assert prompts["s\nu"].messages == tuple(talk)
    short = FromFile(path, read_jsonl(path), ONE, max_prompt_tokens=13)
    assert "s\nu" not in {prompt.text for prompt in first(short.prompts("a", SCALE), 6)}
    with pytest.raises(ConfigError, match="--max-prompt-tokens 1 leaves no prompt"):
        next(FromFile(path, read_jsonl(path), ONE, max_prompt_tokens=1).prompts("a", SCALE))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no prompts"),
        ("[1]", "line 1: not a JSON object"),
        ("{}", "line 1: there must be `messages`"),
        ('{"prompt": 5}', "line 1: there must be `messages`"),
        ('{"prompt": "a", "max_tokens": 0}', "line 1: output_tokens must be"),
        ('{"prompt": "a"}\n' + "[" * 100_000, "line 2: not a JSON object"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_jsonl(path)


@pytest.mark.parametrize("text", ["", "{}", "[]", "[[]]", "\x00", "[" * 100_000])
def test_bad_sharegpt_files_are_refused(tmp_path, text):
    path = tmp_path / "share.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"share\.json"):
        read_sharegpt(path)


def test_a_trace_gives_lengths_in_its_order():
    trace = [Arrival(0.0, 100, 5), Arrival(1.0, 5000, 900)]
    prompts = first(OfTrace(trace, "t", 1000, 100).prompts("a", SCALE), 3)
    assert [prompt.output_tokens for prompt in prompts] == [5, 100, 5]
    assert [SCALE.tokens(prompt.text) for prompt in prompts] == [100, 1000, 100]


def test_the_token_scale_is_a_line():
    scale = TokenScale.through((10, 50), (35, 115))
    assert (scale.per_word, scale.overhead) == (2.0, 15.0)
    assert scale.words(115) == 50 and scale.tokens("a " * 50) == 115
    assert scale.words(100, overhead=False) == 50
    assert not TokenScale.through((10, 50), (0, 0)).measured  # a server that does not say


def test_bodies_hold_what_any_server_knows():
    (prompt,) = first(RandomWords(ONE, Lengths.parse("x", "7")).prompts("a", SCALE), 1)
    body = json.loads(Target("http://x", extra={"temperature": 0.5, "top_p": 0.9}).body(prompt, "m"))
    assert body["max_tokens"] == 7 and body["temperature"] == 0.5 and body["top_p"] == 0.9
    assert body["messages"] == [{"role": "user", "content": prompt.text}] and body["ignore_eos"] is True
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    text = json.loads(Target("http://x", endpoint="completions", ignore_eos=False).body(prompt, "m"))
    assert text["prompt"] == prompt.text and "messages" not in text and "ignore_eos" not in text


def test_bases_end_in_v1():
    assert Target("http://x:1/").base == Target("http://x:1/v1").base == "http://x:1/v1"
    assert Target("https://x/api").base == "https://x/api/v1"


def test_a_key_is_in_no_representation():
    assert "secret" not in repr(Target("http://x", api_key="secret"))
