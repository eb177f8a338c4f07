"""`kvarn serve`: what it makes of its options, without a model."""

import math
from pathlib import Path

import pytest

import kvarn.cli.progress
import kvarn.server
from kvarn.cli import main
from kvarn.config import SchedulerConfig
from kvarn.engine import model_name

PULLED = Path("models/file.Q4_0.gguf")


@pytest.fixture
def served(monkeypatch):
    """The options that the server is started with."""
    started = []
    monkeypatch.setattr(kvarn.server, "serve", lambda options, told, **_: started.append(options))
    monkeypatch.setattr(kvarn.cli.progress, "resolve_with_progress", lambda model, quiet: PULLED)

    def serve(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["serve", *arguments])
        assert end.value.code == 0
        return started.pop()

    return serve


def names(options):
    return [(spec.name, *spec.aliases) for spec in options.models]


def test_a_catalogued_model_goes_by_its_name(served):
    assert names(served("smollm2-135m-instruct")) == [("smollm2-135m-instruct",)]
    assert names(served()) == [("smollm2-135m-instruct",)]


def test_the_catalogued_name_stays_good_beside_the_served_one(served):
    options = served("smollm2-135m-instruct", "--served-model-name", "mine")
    assert names(options) == [("mine", "smollm2-135m-instruct")]
    assert options.models[0].source == str(PULLED)


def test_a_name_from_the_hub_is_whole(served):
    assert names(served("owner/Some-0.5B")) == [("owner/Some-0.5B",)]


def test_several_models_have_names_and_settings_of_their_own(served):
    options = served(
        "small", "big=owner/Some-7B,max-model-len=2048,kv-cache-bytes=1GiB,idle-unload=10m", "third,max_num_seqs=4",
        "--max-model-len", "512", "--memory-budget", "8GiB", "--idle-unload", "1h", "--lazy",
    )  # fmt: skip
    assert names(options) == [("small",), ("big", "owner/Some-7B"), ("third",)]
    small, big, third = options.models
    assert (small.engine.max_model_len, big.engine.max_model_len, third.engine.max_model_len) == (512, 2048, 512)
    assert (small.engine.cache.kv_cache_bytes, big.engine.cache.kv_cache_bytes) == (None, 1 << 30)
    assert (small.engine.scheduler.max_num_seqs, third.engine.scheduler.max_num_seqs) == (64, 4)
    assert (small.keep_seconds, big.keep_seconds, options.pool.keep_seconds) == (None, 600, 3600)
    assert (options.memory_budget, options.lazy) == (8 << 30, True)
    assert served().pool.keep_seconds == math.inf


def test_a_path_with_signs_in_it_is_a_path(served, tmp_path, monkeypatch):
    monkeypatch.setattr(kvarn.cli.progress, "resolve_with_progress", lambda model, quiet: model)
    path = tmp_path / "a=b,c=d.gguf"
    path.touch()
    options = served(str(path), f"x={tmp_path}")
    assert [spec.source for spec in options.models] == [str(path), str(tmp_path)]
    assert names(options) == [("a=b,c=d",), ("x", tmp_path.name)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "a"], "'a' and 'a' both go by 'a'; name them apart"),
        (["a", "b=a"], "'a' and 'b=a' both go by 'a'"),
        (["a", "a=b"], "both go by 'a'"),
        (["a", "b", "--served-model-name", "x"], "served_model_name is for one model"),
        (["a,threads=2"], "a model may have max-model-len, max-num-seqs, kv-cache-bytes, idle-unload, not 'threads'"),
        (["a,max-model-len=many"], "max-model-len of 'a,max-model-len=many' must be a number, not 'many'"),
        (["a,idle-unload=soon"], "must be seconds, or a duration"),
        (["=a"], "the name in '=a' must be letters"),
        (["b="], "'b=' names no model"),
        (["a", "--idle-unload", "soon"], "idle_unload must be seconds, or a duration"),
        (["a", "--load-timeout", "0"], "load_timeout must be above 0"),
        (["a", "--max-waiting-for-load", "0"], "max_waiting_for_load must be at least 1"),
        (["a", "--drain-seconds", "-1"], "drain_seconds must be between 0 and 86400, not -1"),
        (["a", "--memory-budget", "much"], "--memory-budget must be bytes"),
    ],
)
def test_wrong_models_and_settings_are_refused_by_name(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(kvarn.cli.progress, "resolve_with_progress", lambda model, quiet: PULLED)
    with pytest.raises(SystemExit) as end:
        main(["serve", *arguments])
    assert end.value.code == 1
    assert message in capsys.readouterr().err


def test_settings_of_the_scheduler_are_passed_on(served):
    options = served("--policy=fair", "--max-num-queued-tokens", "5000", "--itl-target-ms", "40", "--ttft-slo-ms=900")
    scheduler = options.models[0].engine.scheduler
    assert (scheduler.policy, scheduler.max_num_queued_tokens) == ("fair", 5000)
    assert (scheduler.itl_target_ms, scheduler.ttft_slo_ms) == (40, 900)
    assert served().models[0].engine.scheduler == SchedulerConfig()


def test_keys_come_from_options_and_the_environment(served, monkeypatch):
    assert served().access.api_keys == ()
    monkeypatch.setenv("KVARN_API_KEYS", "gamma, delta")
    options = served("--api-key", "alpha", "--api-key", "beta")
    assert options.access.api_keys == ("alpha", "beta", "gamma", "delta")
    assert "alpha" not in repr(options)


@pytest.mark.parametrize("keys", ["alpha,,beta", ",", "alpha,alpha", "a\tb", "x" * 513, "schlüssel"])
def test_wrong_keys_are_refused_and_not_shown(keys, monkeypatch, capsys):
    monkeypatch.setattr(kvarn.cli.progress, "resolve_with_progress", lambda model, quiet: PULLED)
    monkeypatch.setenv("KVARN_API_KEYS", keys)
    with pytest.raises(SystemExit) as end:
        main(["serve"])
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert "api_key number" in said
    assert "alpha" not in said
    assert "x" * 20 not in said


def test_a_path_is_named_by_its_last_part(tmp_path, monkeypatch):
    file = tmp_path / "some-0.5b.gguf"
    file.touch()
    assert model_name(str(file)) == "some-0.5b"
    assert model_name(str(tmp_path)) == tmp_path.name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_name("~/some-0.5b.gguf") == "some-0.5b"
