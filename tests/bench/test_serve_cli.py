"""`kvarn bench serve` as it is typed: tables, JSON, the page and the picture; and against kvarn's own server."""

import json
import re
import sys

import pytest
from fake_openai import fake_server, stream, whole
from live_server import serving
from tiny_engine import tiny_engine

from kvarn.bench.serve.page import Report, html
from kvarn.bench.serve.tables import Grid
from kvarn.cli import main
from kvarn.engine import AsyncLLM

SHORT = ("--prompt-tokens", "25", "--output-tokens", "4")


def kvarn_bench(*arguments):
    """The exit status of `kvarn bench serve`."""
    try:
        main(["bench", "serve", *arguments])
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture
def fake():
    with fake_server(stream) as (url, _):
        yield url


def test_tables_can_be_pasted(fake, capsys):
    arguments = ("--requests", "6", "--concurrency", "2", "--repeats", "2", "--slo", "ttft:60000")
    assert kvarn_bench(fake, *arguments, *SHORT) == 0
    text = capsys.readouterr().out
    for said in (
        "fake-model, chat; 2.00 tokens a word, 5 around each prompt", "random words, 25 in, 4 out", "TTFT, ms",
        "ITL, ms", "6 requests, 2 turns; seed 0", "output tokens/s", "good requests", "12 of 12", "µs a token",
        "the SLO holds: P99 TTFT ≤ 60,000 ms", "95 % confidence interval over 2 turns",
    ):  # fmt: skip
        assert said in text
    assert "±" in text.splitlines()[7]


def test_json_a_page_and_a_picture(fake, capsys, tmp_path):
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    arguments = ("--requests", "5", "--rate", "100", "--json", "--html", str(page), "--plot", str(picture))
    assert kvarn_bench(fake, *arguments, *SHORT) == 0
    result = json.loads(capsys.readouterr().out)
    (turn,) = result["turns"]
    assert turn["completed"] == 5 and turn["times"]["ttft"]["count"] == 5
    assert set(turn["times"]) == {"ttft", "tpot", "itl", "e2e"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "<svg" in text and "TTFT" in text
    # No outside request: nothing is loaded, and addresses are only names of namespaces.
    assert not re.search(r"<(script|link|img|iframe|image)\b|@import|url\((?!#)", text)


def test_a_sweep_says_the_highest(fake, capsys, tmp_path):
    arguments = ("--sweep", "concurrency", "--slo", "ttft:60000", "--seconds", "0.2", "--warmup", "0", "--points", "3")
    assert kvarn_bench(fake, *arguments, "--html", str(tmp_path / "sweep.html"), *SHORT) == 0
    text = capsys.readouterr().out
    assert "the SLO holds up to 4 at a time: " in text and "; more was not tried" in text
    assert "holds, the highest" in (tmp_path / "sweep.html").read_text()


def test_a_sweep_that_finds_nothing_ends_with_1(fake, capsys):
    arguments = ("--sweep", "concurrency", "--slo", "ttft:0.001", "--seconds", "0.2", "--warmup", "0")
    assert kvarn_bench(fake, *arguments, *SHORT) == 1
    assert "no load was found at which the SLO holds" in capsys.readouterr().out


def test_two_servers_have_ratios(fake, capsys):
    with fake_server(stream) as (second, _):
        assert kvarn_bench(fake, "--compare", second, "--requests", "4", "--repeats", "2", "--json", *SHORT) == 0
    result = json.loads(capsys.readouterr().out)
    assert [server["url"] for server in result["servers"]] == [fake, second]
    assert {"requests/s", "TTFT P50, ms"} <= {ratio["figure"] for ratio in result["ratios"]}


def test_where_nothing_is_answered_the_status_is_1(capsys):
    bodies = []

    async def script(writer, body):
        bodies.append(body)
        await (stream(writer, body) if len(bodies) <= 2 else whole(writer, 503, {"error": {"message": "loading"}}))

    with fake_server(script) as (url, _):
        assert kvarn_bench(url, "--requests", "3", "--concurrency", "1", *SHORT) == 1
    assert re.search(r"http 503\s+3\s+loading", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rate", "1", "--concurrency", "2"), "give either --rate or --concurrency"),
        (("--requests", "5", "--seconds", "5"), "give either --requests or --seconds"),
        (("--sweep", "rate"), "--sweep needs --slo, as ttft:500,itl:30"),
        (("--sweep", "speed", "--slo", "ttft:5"), "--sweep must be rate or concurrency, not 'speed'"),
        (("--sweep", "rate", "--slo", "ttft:5", "--concurrency", "2"), "--sweep rate begins at --rate"),
        (("--sweep", "rate", "--slo", "ttft:5", "--repeats", "2"), "--sweep goes with neither"),
        (("--dataset", "wiki"), "--dataset must be one of random, sonnet, prefix, sharegpt, jsonl, not 'wiki'"),
        (("--dataset", "sharegpt"), "--dataset sharegpt needs --data FILE"),
        (("--data", "x.json"), "--data goes with sharegpt, jsonl, sonnet"),
        (("--dataset", "jsonl", "--data", "/no/file.jsonl"), "--data: /no/file.jsonl cannot be read"),
        (("--prefixes", "3"), "--prefixes and --prefix-tokens go with --dataset prefix"),
        (("--trace", "/no/file.csv"), "--trace: /no/file.csv cannot be read"),
        (("--body", "[]"), "--body must be a JSON object"),
        (("--html", "report.pdf"), "--html must name an .html file, not 'report.pdf'"),
        (("--repeats", "0"), "--repeats must be between 1 and 1000, not 0"),
        (("--max-prompt-tokens", "0"), "--max-prompt-tokens must be at least 1, not 0"),
        (("--concurrency", "0"), "--concurrency must be between 1 and 100000, not 0"),
    ],
)
def test_bad_options_are_named_before_anything_is_sent(capsys, arguments, said):
    assert kvarn_bench("http://127.0.0.1:9", *arguments) == 1
    assert said in capsys.readouterr().err


def test_without_aiohttp_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert kvarn_bench("http://127.0.0.1:9") == 1
    assert "pip install 'kvarn[bench]'" in capsys.readouterr().err


def test_what_servers_say_is_escaped_in_the_page():
    evil = "<script>alert(1)</script>"
    text = html(Report(evil, evil, [evil], [(evil, Grid([evil], [[evil]]))], [evil], [evil]), [])
    assert "<script>" not in text and text.count("&lt;script&gt;") == 9


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_kvarns_own_server_is_measured(endpoint, capsys):
    llm = AsyncLLM(tiny_engine(backend="cpu", dtype="float16", max_num_seqs=16, num_blocks=256))
    arguments = ("--requests", "6", "--concurrency", "3", "--prompt-tokens", "100", "--output-tokens", "8", "--json")
    with serving(llm) as url:
        assert kvarn_bench(url, "--endpoint", endpoint, *arguments) == 0
    (turn,) = json.loads(capsys.readouterr().out)["turns"]
    assert (turn["completed"], turn["failed"], turn["output_tokens"]) == (6, 0, 48)
    assert 6 * 85 <= turn["prompt_tokens"] <= 6 * 115  # bytes are its tokens: words have not all the same number
