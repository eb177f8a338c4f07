"""`--speculative`: what is understood, and what is refused by name."""

import pytest

from kvarn.cli.speculative import speculative_config
from kvarn.config import EngineConfig, SpeculativeConfig
from kvarn.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "config"),
    [
        (None, None),
        ("method=ngram", SpeculativeConfig()),
        ("method=ngram,k=auto", SpeculativeConfig(k=None)),
        ("k=4", SpeculativeConfig(k=4)),
        ("k = 3 , ngram_min=1,ngram_max=3, corpus_tokens=5000", SpeculativeConfig("ngram", 3, 8, 1, 3, 5000)),
        ("method=lookahead", SpeculativeConfig("lookahead", window=2, ngram=3, guesses=2)),
        ("method=lookahead,window=7,ngram=5,guesses=6,k=40", SpeculativeConfig("lookahead", 40, window=7, ngram=5,
                                                                               guesses=6)),
        ("method=draft,model=/a/b c.gguf,k=2", SpeculativeConfig("draft", 2, model="/a/b c.gguf")),
        ("method=draft, model = smollm2-135m-instruct", SpeculativeConfig("draft", model="smollm2-135m-instruct")),
        ("method=ngram+draft,model=a,k=3,max_k=16", SpeculativeConfig("ngram+draft", 3, 16, model="a")),
        ("method=draft,model=a,k=8,p_min=0.6", SpeculativeConfig("draft", 8, model="a", p_min=0.6)),
        ("k=auto,max_k=16,max_step_drafts=128", SpeculativeConfig(max_k=16, max_step_drafts=128)),
    ],
)
def test_settings(text, config):
    assert speculative_config(text) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "name=value with a name of method, k, max_k"),
        ("ngram", "name=value"),
        ("depth=3", "'depth=3'"),
        ("k=4,k=5", "k is given twice"),
        ("k=many", "k must be a whole number or auto, not 'many'"),
        ("max_k=auto", "max_k must be a whole number, not 'auto'"),
        ("k=0", "speculative k must be auto, or between 1 and 128"),
        ("k=129", "between 1 and 128"),
        ("method=magic", "speculative method must be one of ngram, draft, lookahead"),
        ("window=0", "speculative window must be between 1 and 64, not 0"),
        ("ngram=1", "speculative ngram must be between 2 and 16, not 1"),
        ("guesses=65", "speculative guesses must be between 1 and 64, not 65"),
        ("guesses=auto", "guesses must be a whole number, not 'auto'"),
        ("method=lookahead,window=20,ngram=3,guesses=13", r"\(window \+ guesses\) \* \(ngram - 1\) must be at most 64"),
        ("method=lookahead,window=40,guesses=40,max_step_drafts=512", "must be at most 128"),
        ("method=draft", "speculative model must be the name or path of a model with method=draft"),
        ("model=tiny.gguf", r"with method=draft or ngram\+draft, absent otherwise, not 'tiny.gguf'"),
        ("method=ngram+draft", "speculative model must be the name or path of a model"),
        ("method=ngram+eagle", r"speculative heads must be the file of heads that method=ngram\+eagle needs"),
        ("method=ngram+lookahead", "speculative method must be one of ngram"),
        ("ngram_min=9,ngram_max=3", r"ngram_max must be between ngram_min \(9\) and 64"),
        ("corpus_tokens=99999999", "corpus_tokens must be between 0 and"),
        ("method=draft,model=a,k=8,p_min=1.5", "p_min must be a number between 0 and 1, not '1.5'"),
        ("method=draft,model=a,k=8,p_min=nan", "p_min must be a number between 0 and 1, not 'nan'"),
        ("method=draft,model=a,p_min=0.5", "p_min must be between 0 and 1, and 0 with k=auto"),
        ("k=4,p_min=0.5", "or other guesses than those of draft and eagle, not 0.5"),
        ("max_step_drafts=0", "max_step_drafts must be between 1 and 4096"),
    ],
)
def test_what_is_wrong_is_named(text, words):
    with pytest.raises(ConfigError, match=words):
        speculative_config(text)


def test_of_lookahead_the_rows_are_counted():
    config = SpeculativeConfig("lookahead", window=7, ngram=4, guesses=6)
    assert (config.window_rows, config.lookahead_rows, config.most) == (21, 39, 39)
    assert SpeculativeConfig("lookahead", 30, window=7, ngram=4, guesses=6).most == 30
    assert SpeculativeConfig("lookahead", 50, window=7, ngram=4, guesses=6).most == 39


def test_what_is_looked_up_first_has_a_limit_of_its_own():
    both, alone = SpeculativeConfig("ngram+draft", 3, 16, model="a"), SpeculativeConfig("draft", 3, 16, model="a")
    assert (both.most, both.most_copies, both.source) == (3, 16, "draft")
    assert (alone.most, alone.most_copies, alone.source) == (3, 0, "draft")
    assert both.writes_ahead and both.costly and both.looks_up_first and not alone.looks_up_first


def test_without_it_no_row_of_a_draft_is_planned():
    assert EngineConfig().max_step_drafts == 0
    assert EngineConfig(speculative=SpeculativeConfig(max_step_drafts=7)).max_step_drafts == 7
