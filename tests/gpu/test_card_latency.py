"""`kvarn bench latency --device cuda` on a tiny model, on a card or in Triton's interpreter, with a given roof."""

import json
from pathlib import Path

import numpy as np
import pytest

from kvarn.backends.cuda import roof as card_roof
from kvarn.backends.cuda.clock import Clock
from kvarn.backends.cuda.roof import CardRoof, measure_roof
from kvarn.bench import card as card_bench
from kvarn.bench.card import CardLatency, CardStepper, card_cost, card_row
from kvarn.bench.card_report import latency_text
from kvarn.bench.latency import read_sizes
from kvarn.bench.limits import Limit
from kvarn.bench.tasks import Task
from kvarn.cli import bench, bench_latency, main
from kvarn.config import CudaConfig
from kvarn.errors import CapacityError
from kvarn.models import load_model
from kvarn.program.counts import Counts
from kvarn.testing.gguf import write_tiny_gguf
from kvarn.weights import open_model

ROOF = CardRoof(copy_bytes=4e12, flops=8e14, dtype="float32")
SMALL = ("--prefill", "3", "--decode", "2", "--batch", "2", "--depth", "3", "--rounds", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", num_hidden_layers=1)


@pytest.fixture
def settings(device):
    return CudaConfig("float32", "int8", device=device)


@pytest.fixture
def here(settings, monkeypatch):
    """The commands measure where the tests run, and the roof is given."""
    for module in (bench, bench_latency):
        monkeypatch.setattr(module, "chosen_device", lambda *_: ("cuda", settings))
    monkeypatch.setattr(card_roof, "measure_roof", lambda *_: ROOF)


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def test_it_is_measured(model, here, settings, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "latency.png"
    assert not run("bench", "latency", model, "--device", "cuda", *SMALL, "--json", "--plot", plot)
    result = json.loads(capsys.readouterr().out)
    assert {"model", "file_bytes", "card", "settings", "date", "versions", "rounds"} <= result.keys()
    assert result["settings"]["weights"] == "int8"
    measured = result["latency"]
    assert [row["task"]["name"] for row in measured["rows"]] == [
        "prefill 3", "decode, batch 2", "decode at 3",
    ]  # fmt: skip
    assert measured["load_s"] > 0 and measured["planned_bytes"] > 0
    for row in measured["rows"]:
        assert len(row["seconds"]) == 1 and row["cost"]["weight_bytes"] > 0
        assert row["limit"] in ("memory", "arithmetic") and row["share"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_it_is_a_table():
    row = card_row(Task("decode, batch 2", "decode", 10, 2), [0.002], Counts(flops=10**12, weight_bytes=10**9), ROOF)
    lines = latency_text("model.gguf: a card", CardLatency((row,), ROOF, 1.5, 3 << 30, 2 << 30)).splitlines()
    assert lines[:3] == [
        "model.gguf: a card",
        "roof of the card: 4,000 GB/s copied, read and written ones together, 800 float32 TFLOP/s",
        "load 1.50 s, 3.00 GiB planned, 2.00 GiB at most, median of 1",
    ]
    said = "decode, batch 2 10,000 (10,000–10,000) 0.200 500 500 62 % arithmetic"
    assert " ".join(lines[-1].split()) == said


def test_the_roof_of_a_card(here, capsys):
    assert not run("bench", "roofline", "--device", "cuda", "--json")
    assert json.loads(capsys.readouterr().out)["roofline"]["flops"] == ROOF.flops


def test_a_roof_is_measured(device):
    found = measure_roof(Clock(device, quick=True), "float32", copy_mib=(1,), matmul=(64,))
    assert found.copy_bytes > 0 and found.flops > 0 and found.dtype == "float32"


def test_steps_follow_one_another_as_in_an_engine(model, settings, monkeypatch):
    """Each decode step reads what the one before chose, after a context that is made once."""
    task, run_apart = Task("", "decode", 3, 2, 5, 4), []
    with open_model(model) as files:
        stepper = CardStepper(load_model(files), settings, [task])
        submit, execute = stepper.executable.submit, stepper.executable.execute
        seen = []

        def submitted(batch, rules, previous):
            seen.append((batch.seq_lens.tolist(), previous.tolist()))
            submit(batch, rules, previous)

        def executed(batch, outputs=()):
            run_apart.append(batch.num_tokens)
            return execute(batch, outputs)

        monkeypatch.setattr(stepper.executable, "submit", submitted)
        monkeypatch.setattr(stepper.executable, "execute", executed)
        assert stepper.seconds(task) > 0
        stepper.executable.close()
    assert seen == [([6, 6], [-1, -1]), ([7, 7], [0, 1]), ([8, 8], [0, 1])]
    assert run_apart == [4, 1] * 2


def test_bytes_are_those_of_the_form(model):
    sizes, task = read_sizes(model), Task("", "decode", 2, 3)
    dense, int8 = (card_cost(sizes, task, CudaConfig("bfloat16", weights)) for weights in ("dense", "int8"))
    assert dense.flops == int8.flops
    matrices = [w for w in sizes.program.weights if len(w.shape) == 2 and w.name != "embed.weight"]
    halved = sum(weight.num_elements - 4 * weight.shape[0] for weight in matrices)
    assert dense.weight_bytes - int8.weight_bytes == 2 * halved


@pytest.mark.parametrize(
    ("cost", "share", "limit"),
    [(Counts(flops=10**11, weight_bytes=4 * 10**9), 0.5, Limit.MEMORY),
     (Counts(flops=4 * 10**12, kv_read_bytes=10**9), 2.5, Limit.ARITHMETIC)],
)  # fmt: skip
def test_a_share_is_of_whichever_takes_longer(cost, share, limit):
    row = card_row(Task("", "decode", 10, 2), [0.001, 0.004, 0.002], cost, ROOF)
    assert (row.step_ms, row.limit, row.share) == (0.2, limit, pytest.approx(share))
    assert row.tokens_per_s.median == pytest.approx(10_000)
    assert np.isclose(row.flops_per_s, cost.flops / 0.002)


def test_what_the_card_has_no_room_for_is_refused(model, monkeypatch):
    monkeypatch.setattr(card_bench, "card_memory", lambda _device: (1 << 20, "free on the GPU"))
    with open_model(model) as files, pytest.raises(CapacityError, match=r"1\.0 MiB are there .*--batch"):
        CardStepper(load_model(files), CudaConfig(device="cuda"), [Task("", "decode", 2)])


def test_without_a_card_it_says_so(model, device, capsys):
    if device == "cuda":
        pytest.skip("there is a card")
    for command in (("latency", model), ("roofline",)):
        assert run("bench", *command, "--device", "cuda") != 0
        assert "device cuda needs" in capsys.readouterr().err
    for option, said in ((("--threads", "2"), "--threads is for a CPU"), (("--isa", "avx2"), "--isa is for a CPU")):
        assert run("bench", "latency", model, "--device", "cuda", *option) != 0
        assert said in capsys.readouterr().err
    assert run("bench", "latency", model, "--weights", "int8") != 0
    assert "--weights is for a GPU" in capsys.readouterr().err
