"""`kvarn serve`: what it makes of its options, without a model."""

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
    monkeypatch.setattr(kvarn.server, "serve", lambda options, **_: started.append(options))
    monkeypatch.setattr(kvarn.cli.progress, "resolve_with_progress", lambda model, quiet: PULLED)

    def serve(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["serve", *arguments])
        assert end.value.code == 0
        return started.pop()

    return serve


def test_a_catalogued_model_goes_by_its_name(served):
    assert served("smollm2-135m-instruct").served_model_names == ("smollm2-135m-instruct",)


def test_the_catalogued_name_stays_good_beside_the_served_one(served):
    options = served("smollm2-135m-instruct", "--served-model-name", "mine")
    assert options.served_model_names == ("mine", "smollm2-135m-instruct")
    assert options.model == str(PULLED)


def test_a_name_from_the_hub_is_whole(served):
    assert served("owner/Some-0.5B").served_model_names == ("owner/Some-0.5B",)


def test_settings_of_the_scheduler_are_passed_on(served):
    options = served("--policy=fair", "--max-num-queued-tokens", "5000", "--itl-target-ms", "40", "--ttft-slo-ms=900")
    scheduler = options.engine.scheduler
    assert (scheduler.policy, scheduler.max_num_queued_tokens) == ("fair", 5000)
    assert (scheduler.itl_target_ms, scheduler.ttft_slo_ms) == (40, 900)
    assert served().engine.scheduler == SchedulerConfig()


def test_keys_come_from_options_and_the_environment(served, monkeypatch):
    assert served().api_keys == ()
    monkeypatch.setenv("KVARN_API_KEYS", "gamma, delta")
    options = served("--api-key", "alpha", "--api-key", "beta")
    assert options.api_keys == ("alpha", "beta", "gamma", "delta")
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
