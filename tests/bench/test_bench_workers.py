"""Workers and the turns they take."""

import sys

import pytest

from kvarn.bench.latency import time_in_turns
from kvarn.bench.process import Worker
from kvarn.bench.roofline import Roof
from kvarn.bench.tasks import Task
from kvarn.errors import ConfigError

TASK = Task("decode", "decode", 4, 3)


def test_a_worker_says_what_it_is_and_times_tasks(fake_worker):
    worker = fake_worker("2", [TASK])
    assert (worker.load_s, worker.peak_rss, worker.info) == (0.25, 1 << 20, "fake on 2")
    assert worker.seconds(TASK) == pytest.approx(0.024)
    assert worker.peak_rss == 2 << 20


def test_a_worker_that_does_not_start_is_quoted(fake_worker):
    with pytest.raises(ConfigError, match=r"fake's worker ended early:\n  the model does not please me"):
        fake_worker("silent", [TASK])


def test_a_python_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"peer: /no/python cannot be run: No such file"):
        Worker("peer", ["/no/python", "script.py"])


@pytest.mark.parametrize(
    ("variant", "said"),
    [("mute", "ended early:\n  enough"), ("rubbish", "answered '42"), ("instant", "reports 0.0 seconds for decode")],
)
def test_a_worker_that_fails_at_work_is_named(fake_worker, variant, said):
    worker = fake_worker(variant, [TASK])
    with pytest.raises(ConfigError) as caught:
        worker.seconds(TASK)
    assert said in str(caught.value)


def test_leaving_a_worker_ends_its_process():
    script = "import sys; print('{\"load_s\": 1}', flush=True); sys.stdin.read(); print('bye', file=sys.stderr)"
    with Worker("patient", [sys.executable, "-c", script]) as worker:
        process = worker._process
    assert process.returncode == 0


def test_workers_take_turns_and_the_first_round_is_not_counted():
    turns = []

    class Counting:
        def __init__(self, name):
            self.name = name

        def seconds(self, task):
            turns.append((task.name, self.name))
            return float(len(turns))

    first, second = Task("first", "prefill", 1), Task("second", "decode", 1)
    seen = []

    def probe():
        """A roof of as many bytes as turns have been taken."""
        return Roof(2, float(len(turns)), 1, 1)

    times = time_in_turns([Counting("A"), Counting("B")], [first, second], 2, probe, lambda *step: seen.append(step))
    one_round = [("first", "A"), ("first", "B"), ("second", "A"), ("second", "B")]
    assert turns == one_round * 3
    assert times["first"].seconds == {"A": [5, 9], "B": [6, 10]}
    assert times["second"].seconds == {"A": [7, 11], "B": [8, 12]}
    assert [roof.read_bytes for roof in times["first"].roofs] == [4.5, 8.5]  # around A's turns
    assert seen == [(done, 12) for done in range(13)]
