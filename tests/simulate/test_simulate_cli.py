"""`kvarn simulate` and `kvarn bench steps`: options, runs, and errors that name what is wrong."""

import json
import random

import pytest
from typer.testing import CliRunner

from kvarn.bench.steps import measure_steps, step_work
from kvarn.cli.app import app
from kvarn.errors import ConfigError
from kvarn.simulate.fit import read_kv, read_steps
from kvarn.simulate.settings import Settings, label, read_settings
from kvarn.testing import write_tiny_gguf


@pytest.fixture
def cost(tmp_path):
    numbers, items = random.Random(0), []
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) * 4:
        shape = {"num_tokens": tokens, "num_sequences": 1, "num_sampled": numbers.choice([1, tokens]),
                 "num_attended": tokens * numbers.randrange(1, 500), "num_context": tokens + numbers.randrange(900)}
        items.append({"shape": shape, "seconds": 0.002 + 0.0002 * tokens + 1e-7 * shape["num_context"]})
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"steps": items}))
    return path


def run(cost, *arguments):
    return CliRunner().invoke(app, ["simulate", "--cost", str(cost), *map(str, arguments)])


POISSON = ("--traffic", "poisson", "--rate", "2", "--requests", "40", "--prompt-tokens", "100", "--output-tokens", "20")


def test_runs_are_all_combinations(cost):
    result = json.loads(run(cost, *POISSON, "--batching", "static,continuous", "--cache-blocks", "200,4000",
                            "--json").output)  # fmt: skip
    assert [(r["settings"]["batching"], r["settings"]["num_blocks"]) for r in result["runs"]] == [
        ("static", 200), ("static", 4000), ("continuous", 200), ("continuous", 4000),
    ]  # fmt: skip
    assert all(r["finished"] == 40 for r in result["runs"])
    static, continuous = result["runs"][1], result["runs"][3]
    assert continuous["ttft"]["99"] < static["ttft"]["99"]
    assert result["fit"]["median_error"] < 0.01


def test_a_table_has_a_row_for_each_run(cost):
    output = run(cost, *POISSON, "--policy", "fcfs,fair", "--tenants", "2").output
    assert "40 requests in" in output and "fcfs" in output and "fair" in output
    assert "computed twice" not in output, "columns that say nothing are left out"


def test_the_tier_takes_what_was_measured_unless_told_otherwise(cost):
    content = json.loads(cost.read_text())
    cost.write_text(json.dumps({**content, "kv": {"bytes_per_token": 2000, "move_bandwidth": 1e9}}))
    chat = (*POISSON, "--prefix-groups", "8", "--prefix-tokens", "400", "--cache-blocks", "80", "--json")
    runs = json.loads(run(cost, *chat, "--kv-offload-bytes", "0,64MiB").output)["runs"]
    assert [r["settings"]["kv_offload_bytes"] for r in runs] == [0, 64 << 20]
    assert [r["settings"]["kv_bytes_per_token"] for r in runs] == [2000, 2000]
    assert runs[0]["loaded_tokens"] == 0 < runs[1]["loaded_tokens"]
    assert runs[1]["hit_rate"] > runs[0]["hit_rate"]
    slow = ("--kv-offload-bytes", "64MiB", "--kv-move-bandwidth", "1000", "--kv-bytes-per-token", "3000")
    (declared,) = json.loads(run(cost, *chat, *slow).output)["runs"]
    assert declared["settings"]["kv_bytes_per_token"] == 3000
    assert declared["loaded_tokens"] == 0


def test_refusals_are_in_the_table(cost):
    burst = ("--traffic", "burst", "--rate", "200", "--requests", "80", "--ttft-slo-ms", "100")
    (result,) = json.loads(run(cost, *burst, "--json").output)["runs"]
    assert result["late"] == result["refused"] > 0
    output = run(cost, *burst).output
    assert "of them late" in output and str(result["late"]) in output


def test_a_trace_is_cut_scaled_and_repeated(cost, tmp_path):
    trace = tmp_path / "t.jsonl"
    trace.write_text("".join(
        json.dumps({"arrival": second, "prompt_tokens": 10 * (second + 1), "output_tokens": 4}) + "\n"
        for second in range(10)
    ))  # fmt: skip
    result = json.loads(run(cost, "--trace", trace, "--start", 2, "--duration", 4, "--speed", 2, "--token-scale", 0.5,
                            "--json").output)  # fmt: skip
    assert (result["requests"], result["seconds"]) == (4, 1.5)
    assert result["runs"][0]["prompt_tokens"] == 5 * (3 + 4 + 5 + 6)
    assert result["runs"][0]["output_tokens"] == 8
    assert json.loads(run(cost, "--trace", trace, "--requests", 25, "--json").output)["requests"] == 25


def test_runs_come_from_a_file(cost, tmp_path):
    config = tmp_path / "runs.json"
    config.write_text(json.dumps([{"policy": ["fcfs", "priority"], "num_blocks": 300}, {"batching": "dynamic"}]))
    runs = read_settings(config)
    assert [(r.batching, r.policy, r.num_blocks) for r in runs] == [
        ("continuous", "fcfs", 300), ("continuous", "priority", 300), ("dynamic", "fcfs", Settings().num_blocks),
    ]  # fmt: skip
    assert len(json.loads(run(cost, *POISSON, "--config", config, "--json").output)["runs"]) == 3
    assert label(runs[2], runs) == f"dynamic, fcfs, num_blocks {Settings().num_blocks}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"), ("[]", "has no runs"), ("[3]", "item 1 of runs.json is not an object"),
        ('{"batches": 1}', "there is no setting 'batches'"), ('{"num_blocks": "4"}', "num_blocks must be a int"),
        ('{"num_blocks": true}', "num_blocks must be a int"), ('{"num_blocks": 0}', "num_blocks must be between 1"),
        ('{"policy": "whim"}', "policy must be one of"), ('{"batching": "x"}', "batching must be one of"),
        ('{"window": -1}', "window must be"), ('{"max_num_seqs": 0}', "max_num_seqs must be at least 1"),
        ('{"max_num_batched_tokens": 3}', "max_num_batched_tokens must be at least max_num_seqs"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(tmp_path, content, message):
    config = tmp_path / "runs.json"
    config.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_settings(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --trace FILE or --traffic KIND"),
        (("--traffic", "poisson", "--trace", "x.csv"), "either --trace FILE or --traffic KIND"),
        (("--trace", "none.csv"), "cannot be read"),
        (("--traffic", "flood"), "traffic must be one of"),
        ((*POISSON, "--cache-blocks", "many"), "--cache-blocks must be whole numbers"),
        ((*POISSON, "--policy", "fcfs,,fair"), "--policy must be names"),
        ((*POISSON, "--policy", "whim"), "policy must be one of"),
        ((*POISSON, "--speed", "0"), "--speed must be between"),
        ((*POISSON, "--start", "1e9"), "leave no requests"),
        ((*POISSON, "--plot", "picture.svg"), "--plot must name a .png"),
        ((*POISSON, "--block-size", "0"), "block_size must be between"),
        ((*POISSON, "--kv-offload-bytes", "1GiB"), "kv_bytes_per_token must be given where there is kv_offload_bytes"),
        ((*POISSON, "--kv-offload-bytes", "lots"), "--kv-offload-bytes must be bytes"),
        ((*POISSON, "--kv-move-bandwidth", "fast"), "--kv-move-bandwidth must be bytes"),
        ((*POISSON, "--batching", "static", "--ttft-slo-ms", "5"), "ttft_slo_ms is for continuous batching"),
    ],
)
def test_wrong_options_are_named(cost, arguments, message):
    assert message in str(run(cost, *arguments).exception)


def test_runs_are_drawn(cost, tmp_path):
    path = tmp_path / "runs.png"
    assert run(cost, *POISSON, "--batching", "static,continuous", "--plot", path).exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_steps_are_measured_in_the_engine_and_fitted(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    done = []
    measured = measure_steps(path, threads=1, max_num_tokens=32, max_num_seqs=4, rounds=1,
                             progress=lambda *at: done.append(at))  # fmt: skip
    shapes = [step.shape for step in measured]
    assert {1, 2, 4, 8, 16, 32} <= {shape.num_tokens for shape in shapes}
    assert any(shape.num_tokens == shape.num_sampled == 4 for shape in shapes), "four decodes at once"
    assert any(1 < shape.num_sampled < shape.num_tokens for shape in shapes), "decodes beside a prompt"
    assert all(step.seconds > 0 for step in measured)
    assert done[-1][0] == done[-1][1]
    output = CliRunner().invoke(app, ["bench", "steps", str(path), "--tokens", "16", "--seqs", "2", "--rounds", "1",
                                      "--threads", "1", "--json"]).output  # fmt: skip
    saved = tmp_path / "steps.json"
    saved.write_text(output)
    assert read_steps(saved)
    kv = read_kv(saved)
    assert kv.bytes_per_token == 2 * 2 * 16 * 2 * 2, "layers, heads, dimensions, key and value, bytes"
    assert kv.move_bandwidth > 0
    assert json.loads(output)["model"] == "tiny.gguf"
    assert "prompt of 16" in CliRunner().invoke(
        app, ["bench", "steps", str(path), "--tokens", "16", "--seqs", "2", "--rounds", "1", "--threads", "1"]
    ).output  # fmt: skip


def test_steps_larger_than_a_sequence_are_refused():
    with pytest.raises(ConfigError, match="--tokens must be at most 88"):
        step_work(100, 4, 100)
