"""What is recorded of an engine, what the file says, and what is told of one request."""

import dataclasses
import json

import pytest
from gated_engine import Broken
from tiny_engine import handmade_engine, request, run_core, tiny_engine, tokens_of
from typer.testing import CliRunner

from kvarn.cli.app import app
from kvarn.errors import ConfigError
from kvarn.runner import MoveSeconds
from kvarn.tracing import TraceRecorder, read_trace, write_trace
from kvarn.tracing.explain import explain
from kvarn.tracing.summary import summary


class Clock:
    """Moves by a millisecond whenever it is read."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        self.now += 0.001
        return self.now


def recorded(requests, abort=None, max_entries=10_000, **engine_settings):
    """(recorder, outputs, stats) of an engine that runs the requests; `abort` is ended after three steps."""
    clock = Clock()
    recorder = TraceRecorder(32, max_entries=max_entries, clock=clock)
    settings = {"max_num_seqs": 3, "num_blocks": 64, "max_num_batched_tokens": 32, "max_model_len": 128}
    engine = handmade_engine(**{**settings, **engine_settings}, observer=recorder, clock=clock)
    try:
        if abort is not None:
            for one in requests:
                engine.core.add(one)
            for _ in range(3):
                engine.core.step()
            engine.core.abort(abort)
            return recorder, run_core(engine.core, []), engine.core.stats()
        return recorder, run_core(engine.core, requests), engine.core.stats()
    finally:
        engine.core.close()


def several(count, prompt=30, max_tokens=8):
    return [request(f"r{i}", tuple((i * 7 + p) % 256 for p in range(prompt)), max_tokens=max_tokens)
            for i in range(count)]  # fmt: skip


def traced(requests, folder):
    """The history of an engine that runs the requests, written and read."""
    write_trace(folder / "t.json", recorded(requests)[0])
    return read_trace(folder / "t.json")


@pytest.fixture
def pressed(tmp_path):
    """The trace of a small cache: two sequences of three blocks each where there are five."""
    recorder, _, stats = recorded(several(3, 20, 28), num_blocks=5)
    assert stats.preemptions > 0
    path = tmp_path / "trace.json"
    write_trace(path, recorder)
    return path, recorder, stats


def test_every_step_is_recorded_with_all_its_parts():
    recorder, outputs, stats = recorded(several(4))
    steps = list(recorder.steps)
    assert [step.number for step in steps] == list(range(1, stats.steps + 1))
    assert sum(part.sampled for step in steps for part in step.parts) == stats.generated_tokens
    assert max(step.shape.num_tokens for step in steps) <= 32
    first = steps[0]
    assert [(part.request_id, part.start, part.count) for part in first.parts] == [("r0", 0, 30), ("r1", 0, 2)]
    assert first.held is not None and first.held == ("r2", "budget")
    assert [event.kind for event in first.happened] == ["queued"] * 4 + ["admitted"] * 2
    assert first.times.began < first.times.decided < first.times.executed < first.times.ended
    ended = [event for step in steps for event in step.happened if event.kind == "ended"]
    assert {(event.request_id, event.tokens, event.reason) for event in ended} == {
        (name, len(tokens_of(outputs[name])), "length") for name in outputs
    }


def test_recording_changes_nothing():
    watched = recorded(several(5, 20, 28), num_blocks=6)[1]
    engine = handmade_engine(max_num_seqs=3, num_blocks=6, max_num_batched_tokens=32, max_model_len=128)
    try:
        alone = run_core(engine.core, several(5, 20, 28))
    finally:
        engine.core.close()
    assert {name: tokens_of(outputs) for name, outputs in watched.items()} == {
        name: tokens_of(outputs) for name, outputs in alone.items()
    }


def test_the_ring_is_bounded_and_says_what_it_dropped(tmp_path):
    recorder, _, stats = recorded(several(6, 30, 20), max_entries=50)
    assert sum(1 + len(step.parts) + len(step.happened) for step in recorder.steps) <= 50
    assert recorder.num_dropped + len(recorder.steps) == stats.steps
    write_trace(tmp_path / "t.json", recorder)
    history = read_trace(tmp_path / "t.json")
    assert f"{recorder.num_dropped} older steps" in summary(history)
    assert "came before the trace begins" in explain(history, next(reversed(history.lives.values())).request_id)


def test_nothing_is_kept_of_requests_that_have_ended():
    recorder, _, _ = recorded(several(4), abort="r3")
    assert not recorder._live and not recorder._waiting


def test_a_failed_step_ends_what_was_lost_and_what_comes_later_is_not_taken_for_it(tmp_path):
    clock, breaks = Clock(), []

    def breakable(executable):
        breaks.append(Broken(executable))
        return breaks[0]

    recorder = TraceRecorder(32, clock=clock)
    core = handmade_engine(
        max_num_seqs=2, num_blocks=64, max_num_batched_tokens=32, max_model_len=128, observer=recorder, clock=clock,
        wrap_executable=breakable,
    ).core  # fmt: skip
    try:
        for one in several(3):
            core.add(one)
        for _ in range(4):
            core.step()
        breaks[0].failures = 1
        with pytest.raises(RuntimeError):
            core.step()
        core.reset()
        assert not recorder._live and not recorder._waiting
        run_core(core, [request("later", "x" * 20, max_tokens=4)])
        assert not recorder._live and not recorder._waiting
    finally:
        core.close()
    assert [step.number for step in recorder.steps] == list(range(1, len(recorder.steps) + 1))
    failed = recorder.steps[4]
    assert (failed.parts, failed.waiting) == ((), 0)
    assert {(e.request_id, e.reason) for e in failed.happened if e.kind == "ended"} == {
        ("r0", "error"), ("r1", "error"), ("r2", "error"),
    }  # fmt: skip
    write_trace(tmp_path / "t.json", recorder)
    history = read_trace(tmp_path / "t.json")
    assert [life.request_id for life in history.lives.values()] == ["r0", "r1", "r2", "later"]
    assert "ended (error) after" in explain(history, "r0")
    assert "ended (length) after 4 tokens" in explain(history, "later")


def test_the_file_is_a_chrome_trace(pressed):
    path, recorder, _ = pressed
    content = json.loads(path.read_text())
    events = content["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "i", "C"}
    for event in events:
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and event["name"]
        assert event["ph"] == "M" or event["ts"] >= 0
        assert event["ph"] != "X" or event["dur"] >= 0
    steps = [event for event in events if event["ph"] == "X" and event["name"].startswith("step ")]
    assert len(steps) == len(recorder.steps)
    begins = [event["ts"] for event in steps]
    assert begins == sorted(begins)


def test_what_is_written_is_read_back(pressed):
    path, recorder, stats = pressed
    history = read_trace(path)
    assert list(history.steps) == [step.number for step in recorder.steps]
    assert {life.request_id for life in history.lives.values()} == {"r0", "r1", "r2"}
    moments = [moment for life in history.lives.values() for moment in life.moments]
    assert sum(moment.kind == "preempted" for moment in moments) == stats.preemptions
    assert sum(share.sampled for life in history.lives.values() for share in life.shares) == stats.generated_tokens
    assert set(history.phases) == {"schedule", "execute", "book"}


def test_a_request_is_explained_in_words(pressed, tmp_path):
    history = read_trace(pressed[0])
    stories = {name: explain(history, name) for name in ("r0", "r1", "r2")}
    assert "preempted" not in stories["r0"], "the first in order never is"
    assert "came in with a prompt of 20 tokens" in stories["r0"]
    assert "first token, after 20 tokens were computed in 1 step" in stories["r0"]
    assert stories["r0"].splitlines()[-1].endswith("ended (length) after 28 tokens")
    preempted = next(story for story in stories.values() if "was preempted" in story)
    assert "blocks ran out, and it was last in order" in preempted
    assert "it gave up the blocks of 32 tokens" in preempted
    assert "32 tokens were still in the cache" in preempted
    assert "cached blocks evicted meanwhile: 1" in stories["r2"]
    assert any("first in line, but too few blocks of the KV cache were free" in story for story in stories.values())
    assert any("others were before it" in explain(traced(several(8), tmp_path), f"r{i}") for i in range(8))


def test_what_is_computed_again_is_said(tmp_path):
    recorder, _, _ = recorded(several(3, 20, 28), num_blocks=5, prefix_caching=False)
    write_trace(tmp_path / "t.json", recorder)
    assert "all is computed again" in explain(read_trace(tmp_path / "t.json"), "r1")


def test_hits_are_told_and_who_waits_for_one(tmp_path):
    text = tuple(range(60))
    recorder, outputs, stats = recorded([request("first", text), request("second", text)])
    write_trace(tmp_path / "t.json", recorder)
    story = explain(read_trace(tmp_path / "t.json"), "second")
    assert "another was computing the same tokens" in story
    hits = outputs["second"][-1].num_cached_tokens
    assert 0 < hits == stats.prefix_hits
    assert f"{hits} tokens were found in the cache" in story
    assert f"{hits} found in the cache" in summary(read_trace(tmp_path / "t.json"))


def test_who_goes_on_from_what_another_has_computed_says_so(tmp_path):
    recorder = TraceRecorder(32)
    core = handmade_engine(max_num_batched_tokens=32, max_model_len=160, policy="priority", observer=recorder).core
    text = tuple(range(120))
    try:
        core.add(dataclasses.replace(request("later", text), priority=1))
        core.step()
        # It overtakes, computes 31 of the step's tokens, and fills two blocks that the other has begun one of.
        core.add(request("first", text))
        run_core(core, [])
    finally:
        core.close()
    write_trace(tmp_path / "t.json", recorder)
    story = explain(read_trace(tmp_path / "t.json"), "later")
    assert "went on from 15 tokens more, which another had computed meanwhile" in story


def test_loads_from_the_second_tier_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("kvarn.engine.tier.measure_move", lambda executable, file: MoveSeconds(0.0, 0.0))
    recorder = TraceRecorder(128)
    core = tiny_engine(
        num_blocks=8, max_model_len=120, max_num_batched_tokens=128, observer=recorder, identity="tiny",
        kv_offload_bytes=1 << 20, kv_offload_dir=str(tmp_path),
    ).core  # fmt: skip
    try:
        for name in ("a", "b", "c"):
            run_core(core, [request(name, name * 90)])
        outputs = run_core(core, [request("again", "a" * 90)])["again"]
        assert core.stats().loaded_tokens == outputs[-1].num_cached_tokens == 80
    finally:
        core.close()
    write_trace(tmp_path / "t.json", recorder)
    story = explain(read_trace(tmp_path / "t.json"), "again")
    assert "its blocks were being read from the second tier" in story
    assert "80 tokens were read from the second tier into the cache" in story
    assert "80 tokens were found in the cache" in story


def test_why_it_waited_is_counted_in_steps(tmp_path):
    history = traced(several(4, 30, 8), tmp_path)
    story = explain(history, "r3")
    # Three seats: r3 is behind r2 in the first step, then first in line until r0 ends.
    assert "as many sequences ran as may run at once (max_num_seqs)" in story
    waited = next(line for line in story.splitlines() if "had waited" in line)
    assert "in 1 step others were before it" in waited


def test_an_id_may_be_cut_short_but_not_to_several(pressed):
    history = read_trace(pressed[0])
    with pytest.raises(ConfigError, match="begins 3 requests"):
        explain(history, "r")
    with pytest.raises(ConfigError, match="has no request 'x'"):
        explain(history, "x")


def test_the_summary_counts(pressed):
    path, _, stats = pressed
    text = summary(read_trace(path))
    assert f"{stats.steps:,} steps in" in text
    assert f"{stats.generated_tokens:,} sampled, for 3 requests" in text
    assert f"{stats.preemptions:,} preemptions" in text


def test_the_commands_say_it(pressed):
    path = str(pressed[0])
    assert "steps in" in CliRunner().invoke(app, ["trace", "show", path]).output
    assert "came in with a prompt" in CliRunner().invoke(app, ["trace", "explain", path, "r1"]).output
    missing = CliRunner().invoke(app, ["trace", "show", path + ".none"])
    assert isinstance(missing.exception, ConfigError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "{", "is not a JSON file"),
        (lambda c: "[" * 100_000, "is not a JSON file"),
        (lambda c: "[]", "is no trace that"),
        (lambda c: json.dumps({"traceEvents": []}), "is no trace that"),
        (lambda c: json.dumps({**c, "traceEvents": [7]}), "event 1: not an object"),
        (lambda c: json.dumps({**c, "traceEvents": [{}]}), "event 1: ph must be a string"),
        (lambda c: json.dumps({**c, "traceEvents": [{"ph": "X", "pid": 1, "args": 3}]}), "args must be an object"),
        (lambda c: json.dumps({**c, "traceEvents": [{"ph": "X", "pid": 1, "args": {}, "ts": "x"}]}),
         "ts must be a number"),
        (lambda c: json.dumps({**c, "otherData": {"format": "kvarn trace 1"}}), "dropped_steps must be"),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_the_place(pressed, change, message):
    path = pressed[0]
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ConfigError, match=message):
        read_trace(path)


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ConfigError, match="--trace-file"):
        write_trace(tmp_path / "no" / "t.json", TraceRecorder(1))


def test_an_empty_trace_is_a_trace(tmp_path):
    write_trace(tmp_path / "t.json", TraceRecorder(1))
    assert summary(read_trace(tmp_path / "t.json")) == "the trace has no steps"
