"""`kvarn spec train`: what it prints, and what it refuses in one line."""

import json

import pytest

from kvarn.cli import main
from kvarn.spec.heads import read_heads
from kvarn.testing import write_tiny_gguf

SMALL = ("--max-tokens", 12, "--draft-vocab", 64, "--data-bytes", "4MiB", "--threads", 1)


def run(*arguments):
    main([str(argument) for argument in ("spec", "train", *arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_training(kind, model, prompts, tmp_path, capsys):
    pytest.importorskip("torch", reason="torch is not installed: heads are trained with it")
    out = tmp_path / "heads.safetensors"
    given = (model, "--kind", kind, "--data", prompts, "--out", out, "--steps", 2, "--ahead", 2, *SMALL)
    with pytest.raises(SystemExit) as ended:
        run(*given, "--json")
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["kind"], result["texts"], result["steps"], result["draft_vocab"]) == (kind, 80, 2, 64)
    assert len(result["acceptance"]) == 2 and result["answer_tokens"] > 80
    assert list(read_heads(out, kind).training.acceptance) == result["acceptance"]
    assert (tmp_path / "heads.safetensors.work").is_dir()
    with pytest.raises(SystemExit):
        run(*given, "--resume")
    text = capsys.readouterr().out
    assert "held-out acceptance" in text and f"written: {out}" in text
    with pytest.raises(SystemExit):
        main(["plan", str(model), "--json", "--speculative", f"method={kind},heads={out}"])
    served = json.loads(capsys.readouterr().out)["served"]
    assert served["drafter"]["weights"] > 0 == served["drafter"]["kv_cache"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kind", "magic"), "--kind must be medusa or eagle, not 'magic'"),
        (("--data", "/nowhere.txt"), "--data: cannot read /nowhere.txt"),
        (("--data-bytes", "much"), "--data-bytes"),
        (("--max-tokens", 9999), "max"),
        (("--temperature", "-1"), "--temperature must be between"),
    ],
)
def test_what_is_wrong_is_one_line(options, words, model, prompts, tmp_path, capsys):
    pytest.importorskip("torch", reason="torch is not installed: heads are trained with it")
    given = {"--kind": "medusa", "--data": prompts, "--out": tmp_path / "o", "--steps": 1}
    given |= dict(zip(SMALL[::2], SMALL[1::2], strict=True)) | {options[0]: options[1]}
    with pytest.raises(SystemExit) as ended:
        run(model, *(part for pair in given.items() for part in pair))
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_without_torch_it_says_what_to_install(model, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run(model, "--kind", "medusa", "--data", prompts, "--out", tmp_path / "o")
    assert "pip install 'kvarn[train]'" in capsys.readouterr().err
