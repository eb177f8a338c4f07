"""Heads learn what their model says; the same settings make the same heads, in one go or in two."""

import numpy as np
import pytest
from learnable import learnable
from tiny_engine import request, run_core, tokens_of

from kvarn.config import CacheConfig, EngineConfig, SpeculativeConfig
from kvarn.engine import build_engine
from kvarn.errors import ConfigError
from kvarn.spec.heads import KINDS, read_heads
from kvarn.testing import byte_tokenizer
from kvarn.training.run import train

pytest.importorskip("torch", reason="torch is not installed: heads are trained with it")


@pytest.fixture(autouse=True)
def one_thread():
    """Others test at the same time; and sums have one order whatever the machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_tiny(settings, told=lambda what, share: None):
    return train(learnable(), byte_tokenizer(), settings, told)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_heads_guess_what_comes(kind, settings_for):
    settings, said = settings_for(kind), []
    trained = train_tiny(settings, lambda what, share: said.append((what, share)))
    before = train_tiny(settings_for(kind, steps=1, out=settings.out.with_name("first.safetensors")))
    rates, first = trained.heads.training.acceptance, before.heads.training.acceptance
    assert rates[0] > max(0.25, 2 * first[0]), "chance is below 0.01"
    assert (trained.texts, trained.heads.training.steps) == (80, 60)
    assert 0.9 < trained.coverage <= 1
    for part in ("collecting answers", "training"):
        shares = [share for what, share in said if what == part]
        assert shares == sorted(shares) and 0 <= shares[0] <= shares[-1] <= 1

    read = read_heads(settings.out, kind, trained.heads.target)
    assert read.training == trained.heads.training
    answers, drafted = {}, None
    for speculative in (None, SpeculativeConfig(kind, k=3, heads=str(settings.out))):
        config = EngineConfig(max_model_len=256, cache=CacheConfig(num_blocks=64), speculative=speculative)
        core = build_engine(learnable(), byte_tokenizer(), config).core
        outputs = run_core(core, [request(str(i), f"{i * 7} or {i}", max_tokens=60) for i in range(8)])
        answers[speculative] = {name: tokens_of(o) for name, o in outputs.items()}
        drafted = core.stats()
        core.close()
    assert len({str(sorted(a.items())) for a in answers.values()}) == 1
    assert drafted.accepted_by_position[0] / drafted.drafts > 0.25, "as often as held-out acceptance says"


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_was_interrupted_ends_in_the_same_heads(kind, settings_for, monkeypatch):
    whole = train_tiny(settings_for(kind, steps=12))
    settings = settings_for(kind, steps=12, work=settings_for(kind).work.with_name("other"))

    class Stopped(Exception):
        pass

    def stop(what, share):
        if what == "training" and share > 0.5:
            raise Stopped

    monkeypatch.setattr("kvarn.training.learn.CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Stopped):
        train_tiny(settings, stop)
    shares = []
    resumed = train_tiny(
        settings_for(kind, steps=12, work=settings.work, resume=True), lambda what, share: shares.append((what, share))
    )
    assert {what for what, _ in shares} == {"training"}, "answers are not collected again"
    assert min(share for _, share in shares) >= 0.5
    assert resumed.heads.training == whole.heads.training
    for name, values in whole.heads.tensors.items():
        np.testing.assert_array_equal(resumed.heads.tensors[name], values)


def test_a_checkpoint_of_another_training_is_refused(settings_for):
    train_tiny(settings_for("medusa", steps=1))
    with pytest.raises(ConfigError, match="of another training"):
        train_tiny(settings_for("medusa", steps=1, rate=1e-4, resume=True))
    checkpoint = settings_for("medusa").work / "medusa.checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="no checkpoint to go on from"):
        train_tiny(settings_for("medusa", steps=1, resume=True))


def test_answers_of_other_settings_are_refused(settings_for):
    train_tiny(settings_for("medusa", steps=1))
    with pytest.raises(ConfigError, match="holds texts of another model, data file or setting"):
        train_tiny(settings_for("medusa", steps=1, temperature=0.1))


def test_the_time_is_kept(settings_for):
    """Without steps minutes count: those of earlier runs, too."""
    once = train_tiny(settings_for("medusa", steps=None, minutes=0.01))
    assert once.texts >= 16, "what was begun is finished"
    assert once.heads.training.steps > 0
    said = []
    again = train_tiny(
        settings_for("medusa", steps=None, minutes=0.01, resume=True), lambda what, share: said.append(what)
    )
    assert not said
    assert again.heads.training == once.heads.training


def test_too_little_to_learn_from_is_said(settings_for, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("only a prompt, and it is held out\n")
    with pytest.raises(ConfigError, match="no answers to train on"):
        train_tiny(settings_for("medusa", data=path))
    with pytest.raises(ConfigError, match="--data-bytes must be at least"):
        train_tiny(settings_for("medusa", data_bytes=100, work=tmp_path / "w"))
    with pytest.raises(ConfigError, match="--ahead must be between 1 and 8, not 9"):
        settings_for("medusa", ahead=9)
