"""`kvarn bench` and `kvarn profile` on a tiny model with a fake peer and a given roof."""

import json
import sys
from pathlib import Path

import pytest

from kvarn.bench import compare, roofline
from kvarn.cli import main

FAKE = Path(__file__).with_name("fake_peer.py")
PNG = b"\x89PNG\r\n\x1a\n"
COMPARE = ("bench", "compare", "--peer-python", "no-python")
SMALL = ("--prefill", "20", "--depth", "40", "--rounds", "2", "--threads", "2")


def run(*arguments) -> None:
    """The command; typer ends with SystemExit where all went well too."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code in (0, None)


@pytest.fixture
def quick(monkeypatch):
    """Measuring the machine takes a moment only."""
    monkeypatch.setattr(roofline, "PASSES", 1)
    monkeypatch.setattr(roofline, "PASS_SECONDS", 1e-4)
    monkeypatch.setattr(roofline, "SMALLEST_BUFFER", 16 << 20)
    monkeypatch.setattr(roofline, "CACHES_IN_BUFFER", 0)


def test_roofline(quick, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    run("bench", "roofline", "--threads", "1,2,1", "--json", "--plot", tmp_path / "roof.png")
    result = json.loads(capsys.readouterr().out)
    assert [roof["threads"] for roof in result["roofline"]["roofs"]] == [1, 2]
    assert all(value > 0 for roof in result["roofline"]["roofs"] for value in roof.values())
    assert (tmp_path / "roof.png").read_bytes().startswith(PNG)


def test_latency(model, fixed_roof, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    small = (*SMALL, "--decode", "3", "--batch", "1,2")
    run("bench", "latency", model, *small, "--json", "--plot", tmp_path / "latency.png")
    result = json.loads(capsys.readouterr().out)
    assert {"model", "file_bytes", "machine", "isa", "threads", "date", "versions", "rounds"} <= result.keys()
    assert (result["model"], result["file_bytes"], result["threads"]) == (model.name, model.stat().st_size, 2)
    measured = result["latency"]
    assert [row["task"]["name"] for row in measured["rows"]] == [
        "prefill 20", "decode, batch 1", "decode, batch 2", "decode at 40",
    ]  # fmt: skip
    assert measured["load_s"] > 0 and measured["peak_rss"] > 1 << 20
    for row in measured["rows"]:
        assert len(row["seconds"]) == 2
        spread = row["tokens_per_s"]
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        assert row["limit"] in ("memory", "arithmetic") and row["share"] > 0
    assert (tmp_path / "latency.png").read_bytes().startswith(PNG)


def test_latency_as_a_table(model, fixed_roof, capsys):
    run("bench", "latency", model, *SMALL, "--decode", "2", "--batch", "1", "--depth", "0")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny.gguf, 2 threads: ")
    assert lines[-6] == "roof at 2 threads: 10.0 GB/s read, 100 int8 and 20.0 float32 GMAC/s"
    assert [line.split("  ")[0] for line in lines[-2:]] == ["prefill 20", "decode, batch 1"]


def test_compare_counts_the_faster_setting_of_the_peer(model, fixed_roof, monkeypatch, capsys):
    monkeypatch.setitem(compare.PEERS, "fake", compare.Peer(FAKE, {"slow": "4", "fast": "2"}))
    peer = ("--peer", "fake", "--peer-python", sys.executable)
    run("bench", "compare", model, *peer, "--only", "decode", "--depth", "0", "--rounds", "2", "--json")
    result = json.loads(capsys.readouterr().out)["comparison"]
    assert [engine["name"] for engine in result["engines"]] == ["kvarn", "slow", "fast"]
    assert result["engines"][1]["info"].startswith("fake on ")
    for row in result["rows"]:
        assert row["rates"]["slow"]["median"] == pytest.approx(250)
        assert row["rates"]["fast"]["median"] == pytest.approx(500)
        assert row["against"] == "fast"
        assert row["ratio"] == pytest.approx(row["rates"]["kvarn"]["median"] / 500)
        assert {name: len(times) for name, times in row["seconds"].items()} == {"kvarn": 2, "slow": 2, "fast": 2}


def test_profile(model, fixed_roof, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    run("profile", model, *SMALL, "--batch", "3", "--json", "--plot", tmp_path / "profile.png")
    result = json.loads(capsys.readouterr().out)
    assert [each["task"]["name"] for each in result["profiles"]] == [
        "prefill 20", "decode, batch 1", "decode, batch 3", "decode at 40",
    ]  # fmt: skip
    for each in result["profiles"]:
        names = [row["name"] for row in each["rows"]]
        assert names[0] == "embed" and names[-1] == "logits" and "attention" in names
        assert len(names) == len(set(names))
        together = sum(row["ms"] for row in each["rows"]) + each["rest_ms"]
        assert together == pytest.approx(each["step_ms"])
    assert (tmp_path / "profile.png").read_bytes().startswith(PNG)


def test_profile_by_layer_as_a_table(model, fixed_roof, capsys):
    run("profile", model, *SMALL, "--depth", "0", "--by", "layer")
    text = capsys.readouterr().out
    first = text.split("\n\n")[1].splitlines()
    assert [line.split("  ")[0] for line in first[3:]] == [
        "outside", "layer 0", "layer 1", "barriers and rest", "a step", first[-1],
    ]  # fmt: skip
    assert first[-1].startswith("furthest from its limit: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bench", "roofline", "--threads", "1,x"), "--threads must be whole numbers with commas between, not '1,x'"),
        (("bench", "roofline", "--threads", "0"), "--threads must be between 1 and 1024, not 0"),
        (("bench", "roofline", "--isa", "mmx"), "isa must be one of"),
        (("bench", "roofline", "--plot", "roof.pdf"), "--plot must name a .png file, not 'roof.pdf'"),
        (("bench", "roofline", "--plot", "/no/such/folder/a.png"), "--plot: there is no folder /no/such/folder"),
        (("bench", "latency", "MODEL", "--rounds", "0"), "--rounds must be at least 1, not 0"),
        (("bench", "latency", "MODEL", "--prefill", "-1"), "--prefill must be at least 1, not -1"),
        (("bench", "latency", "MODEL", "--batch", "1,9999"), "--batch must be between 1 and 4096, not 9999"),
        (("bench", "latency", "MODEL", "--depth", "-5"), "--depth must be at least 0, not -5"),
        (("bench", "latency", "MODEL", "--depth", "99999"), "--depth must be at most"),
        (("bench", "latency", "MODEL", "--threads", "9999"), "threads must be between 0 and 1024, not 9999"),
        ((*COMPARE, "MODEL", "--peer", "vllm"), "--peer must be one of llama.cpp, openvino, not 'vllm'"),
        ((*COMPARE, ".", "--peer", "openvino"), "peers read .gguf files"),
        ((*COMPARE, "MODEL", "--peer", "openvino", "--only", "x"), "--only 'x' is in no name; there are: prefill 512"),
        (("profile", "MODEL", "--by", "thread"), "--by must be op or layer, not 'thread'"),
        (("profile", "MODEL", "--batch", "0"), "--batch must be at least 1, not 0"),
    ],
)
def test_bad_options_are_named_with_their_limit(model, fixed_roof, capsys, arguments, said):
    with pytest.raises(SystemExit) as caught:
        main([str(model) if argument == "MODEL" else argument for argument in arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 1
    assert captured.out == ""
    assert said in captured.err


def test_a_plot_without_matplotlib_names_the_extra(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main(["profile", str(model), "--plot", "profile.png"])
    assert "--plot needs matplotlib: pip install 'kvarn[plots]'" in capsys.readouterr().err
