"""Memory of the cache that is taken while nothing runs changes no value, leaves others their share, delays nobody."""

import threading

import numpy as np
from tiny_engine import request, tiny_engine, tokens_of

from kvarn.engine import LLM
from kvarn.engine.commit import MemoryCommit
from kvarn.planning import Available
from kvarn.request import SamplingParams

CPU = {"backend": "cpu", "dtype": "float16", "enable_prefix_caching": False}


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def commit_all(core):
    pieces = 1
    while core.idle():
        pieces += 1
    return pieces


def test_all_of_the_cache_is_taken_and_no_more_after_it():
    loaded = tiny_engine(num_blocks=4096, commit_memory=True, **CPU)
    cache = loaded.memory_plan.use.kv_cache
    before = resident_bytes()
    assert commit_all(loaded.core) > 4, "piece by piece"
    assert resident_bytes() - before > 0.9 * cache > 8 << 20
    assert not loaded.core.idle()
    loaded.core.close()


def test_what_is_in_the_cache_stays():
    answers = []
    for commit in (False, True):
        core = tiny_engine(commit_memory=commit, **CPU).core
        core.add(request("a", "a prompt", max_tokens=20))
        events = core.step()
        assert commit_all(core) > 1 or not commit
        while core.has_work():
            events += core.step()
        answers.append(tokens_of(events))
        core.close()
    assert answers[0] == answers[1]


def test_it_is_not_done_unasked():
    core = tiny_engine(**CPU).core
    assert not core.idle()
    core.close()


class Counting:
    left = 5

    def commit(self):
        self.left -= 1
        return self.left


def test_it_ends_where_memory_is_short():
    free = iter([100, 100, 99])
    executable = Counting()
    commit = MemoryCommit(executable, 100, lambda: Available(next(free), "a test"))
    assert [commit.piece() for _ in range(3)] == [True, True, False]
    assert executable.left == 3


def test_requests_are_served_before_the_rest_is_taken():
    loaded = tiny_engine(num_blocks=1024, commit_memory=True, **CPU)
    core, order, all_taken = loaded.core, [], threading.Event()
    idle, step = core.idle, core.step

    def watched_idle():
        order.append("idle")
        return idle() or all_taken.set()

    core.idle = watched_idle
    core.step = lambda: (order.append("step"), step())[1]
    with LLM.from_engine(loaded) as llm:
        llm.generate("a b c", SamplingParams(max_tokens=4, temperature=0.0))
        assert all_taken.wait(60)
    steps = [i for i, what in enumerate(order) if what == "step"]
    assert np.all(np.diff(steps) == 1), "nothing in between while there is work"
    assert order.count("idle") > 1

