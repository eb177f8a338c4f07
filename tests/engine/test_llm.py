"""The engine for scripts: lists in, completions out, in order."""

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_engine import request, run_core, text_of, tiny_engine, tokens_of

from kvarn.config import EngineConfig
from kvarn.engine import LLM
from kvarn.engine.llm import with_overrides
from kvarn.errors import ConfigError, EngineError, RequestError
from kvarn.request import FinishReason, SamplingParams

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=8)


@pytest.fixture(scope="module")
def expected():
    core = tiny_engine().core
    outputs = run_core(core, [request(text, text) for text in ("one", "two", "three")])
    core.close()
    return {name: (tokens_of(o), text_of(o)) for name, o in outputs.items()}


def test_completions_come_in_the_order_of_the_prompts(make_llm, expected):
    completions = make_llm().generate(["one", "two", "three"], GREEDY)
    assert [(list(c.token_ids), c.text) for c in completions] == list(expected.values())
    assert {c.finish_reason for c in completions} == {FinishReason.LENGTH}
    assert completions[0].prompt_token_ids == tuple(b"one")


def test_one_text_and_lists_of_token_ids(make_llm, expected):
    llm = make_llm()
    assert [c.text for c in llm.generate("one", GREEDY)] == [expected["one"][1]]
    assert [c.text for c in llm.generate([list(b"two"), "three"], GREEDY)] == [expected["two"][1], expected["three"][1]]


def test_sampling_params_for_each_prompt(make_llm):
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 2)]
    assert [len(c.token_ids) for c in make_llm().generate(["a", "b"], params)] == [1, 2]
    with pytest.raises(RequestError, match="2 sampling params for 1 prompts"):
        make_llm().generate(["a"], params)


def test_n_choices_of_one_prompt(make_llm):
    (completion,) = make_llm().generate("a", SamplingParams(n=3, seed=5, max_tokens=6, ignore_eos=True))
    assert [c.index for c in completion.choices] == [0, 1, 2]
    assert len({c.token_ids for c in completion.choices}) == 3
    assert completion.text == completion.choices[0].text


def test_more_prompts_than_the_queue_holds(make_llm, expected):
    completions = make_llm(max_num_queued_requests=3, max_num_seqs=2).generate(["one"] * 20, GREEDY)
    assert [c.text for c in completions] == [expected["one"][1]] * 20


def test_more_prompt_tokens_than_the_queue_holds(make_llm, expected):
    llm = make_llm(max_num_seqs=2, scheduling={"max_num_queued_tokens": 7, "policy": "fair"})
    completions = llm.generate(["one"] * 20, GREEDY)
    assert [c.text for c in completions] == [expected["one"][1]] * 20


def test_a_wrong_prompt_is_refused_before_anything_runs(make_llm):
    llm = make_llm()
    with pytest.raises(RequestError, match="not 999"):
        llm.generate([[1], [999]], GREEDY)
    with pytest.raises(RequestError, match="put a single list into a list"):
        llm.generate([1, 2, 3], GREEDY)
    with pytest.raises(RequestError, match="not 999"):
        llm.stream([999], GREEDY)
    assert llm.stats().steps == 0


def test_a_stream_gives_pieces_and_may_be_left(make_llm, expected):
    llm = make_llm()
    assert text_of(list(llm.stream("one", GREEDY))) == expected["one"][1]
    stream = llm.stream("one", SamplingParams(max_tokens=400, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm.generate("two", GREEDY)[0].text == expected["two"][1]
    assert llm.stats().free_blocks == llm.stats().num_blocks
    assert llm.stats().generated_tokens < 400


def test_ctrl_c_leaves_the_engine_as_it_was(make_llm, expected, monkeypatch):
    llm = make_llm()

    def interrupted(inbox):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kvarn.engine.llm._Inbox.get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["one", "two"], SamplingParams(max_tokens=400, ignore_eos=True))
    assert llm.generate("two", GREEDY)[0].text == expected["two"][1]
    assert llm.stats().free_blocks == llm.stats().num_blocks


def test_after_close_there_are_clear_errors(make_llm):
    llm = make_llm()
    llm.close()
    llm.close()
    with pytest.raises(EngineError, match="the engine was closed"):
        llm.generate("a", GREEDY)


def test_an_engine_that_nobody_holds_ends():
    def engine_threads():
        return {thread for thread in threading.enumerate() if thread.name == "kvarn-engine"}

    before = engine_threads()
    llm = LLM.from_engine(tiny_engine())
    (thread,) = engine_threads() - before
    del llm
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_a_script_that_forgets_to_close_ends():
    """Also in the middle of a step, and without a crash in native code."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from tiny_engine import tiny_engine\n"
        "from kvarn.engine import LLM\n"
        "stream = LLM.from_engine(tiny_engine(backend='cpu')).stream('x')\n"
        "print(next(stream).request_id)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "llm-0\n", "")


def test_settings_by_name():
    config = with_overrides(EngineConfig(), {"threads": 2, "max_num_seqs": 3, "kv_cache_dtype": "float32"})
    assert (config.threads, config.scheduler.max_num_seqs, config.cache.dtype) == (2, 3, "float32")
    with pytest.raises(ConfigError, match="there is no setting 'max_seqs'"):
        with_overrides(EngineConfig(), {"max_seqs": 3})
    with pytest.raises(ConfigError, match="threads must be between"):
        with_overrides(EngineConfig(), {"threads": -1})
