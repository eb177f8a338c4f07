"""Many streams over one engine: they end, they abort, they fail, and nothing is lost or left behind."""

import asyncio
import gc
import threading
import time

import pytest
from gated_engine import Broken, gated_llm
from tiny_engine import request, text_of, tokens_of

from kvarn.errors import EngineError, QueueFullError, RequestError
from kvarn.request import FinishReason

TIMEOUT = 30


def with_llm(test, **settings):
    """Runs `test(llm, gate)` in an event loop with an engine that is closed afterwards. The gate is open."""

    async def main():
        async with llm:
            await asyncio.wait_for(test(llm, gate), TIMEOUT)
            gate.open()

    with gated_llm(wrap=Broken, **settings) as (llm, gate):
        gate.open()
        asyncio.run(main())


async def until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def engine_threads():
    """Of all engines in the process: those of other tests' fixtures, too."""
    return {thread for thread in threading.enumerate() if thread.name == "kvarn-engine"}


async def read(stream):
    return [output async for output in stream]


def all_free(llm):
    stats = llm.stats()
    return stats.free_blocks == stats.num_blocks and stats.running == stats.waiting == stats.queued == 0


def test_a_stream_gives_what_a_quiet_engine_gives_and_ends():
    async def test(llm, gate):
        outputs = await read(llm.generate(request("a", "hello")))
        assert len(tokens_of(outputs)) == 8
        assert [o.finished for o in outputs][-1] is True
        again = await asyncio.gather(*(read(llm.generate(request(str(i), "hello"))) for i in range(40)))
        assert all(tokens_of(o) == tokens_of(outputs) for o in again)
        assert llm.stats().generated_tokens == 41 * 8
        assert all_free(llm)

    with_llm(test)


@pytest.mark.parametrize("way", ["cancel", "close", "break", "drop", "abort"])
def test_a_reader_who_leaves_frees_the_blocks_within_a_step(way):
    async def test(llm, gate):
        async def reader():
            stream = llm.generate(request("a", "hello", max_tokens=400))
            if way in ("cancel", "close", "abort"):
                held.append(stream)
            async for output in stream:
                started.set()
                if way == "break":
                    break
                if way == "close":
                    await stream.aclose()
                if way == "drop":
                    return None
                if way == "abort":
                    await llm.abort("a")
                outputs.append(output)
            return outputs

        started, outputs, held = asyncio.Event(), [], []
        task = asyncio.create_task(reader())
        await started.wait()
        if way == "cancel":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(task.done)
        gc.collect()
        steps = gate.begun
        await until(lambda: all_free(llm))
        assert gate.begun <= steps + 2, "the step it was in, and at most the next"
        if way == "abort":
            assert task.result()[-1].outputs[0].finish_reason is FinishReason.ABORT
        assert len(tokens_of(await read(llm.generate(request("a", "again"))))) == 8, "the id is free again"

    with_llm(test)


def test_a_request_nobody_reads_runs_and_one_nobody_holds_ends():
    async def test(llm, gate):
        gate.hold()
        stream = llm.generate(request("held", "hello"))
        llm.generate(request("dropped", "hello", max_tokens=400))
        gate.open()
        await until(lambda: all_free(llm))
        assert llm.stats().generated_tokens < 400
        # That all is free is known before the last outputs have come this way; an answer that began later comes later.
        await read(llm.generate(request("later", "hello")))
        outputs = await read(stream)
        assert len(outputs) == 1, "what has gathered comes at once"
        assert len(tokens_of(outputs)) == 8

    with_llm(test)


def test_an_id_used_again_is_another_request():
    """The first has ended, but its stream does not know yet: the news is on its way to the event loop."""

    async def test(llm, gate):
        first = llm.generate(request("a", "hello", max_tokens=2))
        deadline = time.monotonic() + TIMEOUT
        while not all_free(llm):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        second = llm.generate(request("a", "hello", max_tokens=20))
        await first.aclose()
        outputs = await read(second)
        assert len(tokens_of(outputs)) == 20
        assert outputs[-1].outputs[0].finish_reason is FinishReason.LENGTH

    with_llm(test)


def test_a_slow_reader_gets_everything_in_fewer_pieces():
    async def test(llm, gate):
        quick = await read(llm.generate(request("quick", "hello", max_tokens=100, n=2, logprobs=1)))
        slow = []
        async for output in llm.generate(request("slow", "hello", max_tokens=100, n=2, logprobs=1)):
            slow.append(output)
            await until(lambda: all_free(llm))
        assert len(slow) <= 3, "the first, what gathered, and what was still on its way"
        for index in (0, 1):
            assert tokens_of(slow, index) == tokens_of(quick, index)
            assert text_of(slow, index) == text_of(quick, index)
            logprobs = [lp for o in slow for part in o.outputs if part.index == index for lp in part.logprobs]
            assert [lp.token_id for lp in logprobs] == tokens_of(slow, index)

    with_llm(test)


def test_wrong_requests_and_a_full_queue_are_refused_before_a_stream_exists():
    async def test(llm, gate):
        with pytest.raises(RequestError, match="token ids are 0 to 258"):
            llm.generate(request("a", (999,)))
        gate.hold()
        running = llm.generate(request("running", "x", max_tokens=300))
        gate.stand_in_step(2)
        await anext(running)
        queued = [llm.generate(request(str(i), "x")) for i in range(3)]
        with pytest.raises(QueueFullError, match="3 requests are waiting, the limit is 3"):
            llm.generate(request("more", "x"))
        with pytest.raises(RequestError, match="'1' is in use") as caught:
            llm.generate(request("1", "x"))
        assert caught.value.field == "request_id"
        gate.open()
        assert len(tokens_of(await read(running))) > 8
        for stream in queued:
            assert len(tokens_of(await read(stream))) == 8
        assert all_free(llm)

    with_llm(test, max_num_seqs=1, max_num_queued_requests=3)


def test_a_failed_step_fails_what_is_in_flight_and_the_engine_goes_on(caplog):
    async def test(llm, gate):
        expected = tokens_of(await read(llm.generate(request("before", "hello"))))
        gate.inner.failures = 1
        results = await asyncio.gather(
            *(read(llm.generate(request(str(i), "hello"))) for i in range(3)), return_exceptions=True
        )
        failed = [r for r in results if isinstance(r, EngineError)]
        assert failed, "at least the one that the step was for"
        error_id = str(failed[0]).split("error id ")[1].split(")")[0]
        assert error_id in caplog.text
        assert "the kernel is broken" in caplog.text
        assert "kernel" not in str(failed[0]), "clients are not told of the inside"
        assert tokens_of(await read(llm.generate(request("after", "hello")))) == expected
        assert all_free(llm)
        assert llm.stats().failed_steps == 1
        assert llm.is_running

    with_llm(test)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_an_engine_that_cannot_go_on_refuses_clearly(error):
    async def test(llm, gate):
        gate.inner.failures, gate.inner.error = 10, error
        with pytest.raises(EngineError, match=r"a step of the engine failed.*error id"):
            await read(llm.generate(request("a", "hello")))
        await until(lambda: not llm.is_running)
        assert gate.inner.failures == 10 - 3, "a step and two restarts"
        assert not llm.is_restarting
        with pytest.raises(EngineError, match="the engine stopped"):
            llm.generate(request("b", "hello"))

    with_llm(test, restart_delays=(0.0, 0.0))


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_restart_that_fails_is_tried_again_while_new_requests_wait(error):
    async def test(llm, gate):
        expected = tokens_of(await read(llm.generate(request("before", "hello"))))
        gate.hold()
        gate.inner.failures, gate.inner.error = 2, error
        lost = llm.generate(request("lost", "hello"))
        gate.stand_in_step(gate.begun + 1)
        gate.finish_step()
        with pytest.raises(EngineError, match="may be sent again"):
            await read(lost)
        assert llm.is_restarting, "the first try stands in its trial step"
        waits = llm.generate(request("waits", "hello"))
        gate.open()
        assert tokens_of(await read(waits)) == expected
        stats = llm.stats()
        assert (stats.failed_steps, stats.restarts) == (1, 1)
        assert all_free(llm)
        assert not llm.is_restarting

    with_llm(test, restart_delays=(0.0, 0.0))


@pytest.mark.parametrize("part", ["stats", "has_work", "abort"])
def test_what_ends_the_thread_outside_a_step_is_an_end_for_requests_but_not_for_the_engine(part, monkeypatch):
    async def test(llm, gate):
        core = llm._loop._core
        expected = tokens_of(await read(llm.generate(request("before", "hello"))))
        gate.hold()
        streams = [llm.generate(request(str(i), "hello")) for i in range(3)]
        gate.stand_in_step(gate.begun + 1)
        streams.append(llm.generate(request("submitted", "hello")))

        def dies(*_):
            monkeypatch.undo()
            raise SystemExit("somebody ended the thread")

        monkeypatch.setattr(core, part, dies)
        await llm.abort("0")
        gate.open()
        results = await asyncio.gather(*map(read, streams), return_exceptions=True)
        assert [type(result) for result in results[1:]] == [EngineError] * 3
        assert isinstance(results[0], list) == (part == "has_work"), "its abort came before"
        assert tokens_of(await read(llm.generate(request("0", "hello")))) == expected, "the id is free"
        assert llm.stats().restarts == 1
        assert all_free(llm)

    with_llm(test)


def test_work_for_idle_times_that_fails_is_not_tried_again():
    tries = []

    def idle():
        tries.append(1)
        raise OSError("no memory")

    async def test(llm, gate):
        assert len(tokens_of(await read(llm.generate(request("a", "hello"))))) == 8
        await until(lambda: tries)
        assert len(tokens_of(await read(llm.generate(request("b", "hello"))))) == 8

    with_llm(test, idle=idle)
    assert len(tries) == 1


def test_work_for_idle_times_is_asked_for_again_after_a_step():
    asked = []

    async def test(llm, gate):
        await until(lambda: bool(asked))
        await read(llm.generate(request("a", "hello")))
        await until(lambda: len(asked) >= 2)

    with_llm(test, idle=lambda: bool(asked.append(1)))


def test_close_fails_what_runs_and_is_idempotent():
    async def test(llm, gate):
        gate.hold()
        (thread,) = engine_threads() - others
        stream = llm.generate(request("a", "hello", max_tokens=400))
        gate.stand_in_step(5)
        await anext(stream)
        closing = asyncio.create_task(llm.close())
        await until(lambda: llm._loop._closing)
        gate.open()
        await closing
        await llm.close()
        with pytest.raises(EngineError, match="the engine was closed"):
            await read(stream)
        with pytest.raises(EngineError, match="the engine was closed"):
            llm.generate(request("b", "hello"))
        assert not thread.is_alive()

    others = engine_threads()
    with_llm(test)


def test_a_closed_event_loop_frees_its_requests_and_another_can_go_on():
    kept = []

    async def leave():
        kept.append(llm.generate(request("left", "hello", max_tokens=400)))
        gate.stand_in_step(5)
        await anext(kept[0])

    async def go_on():
        await until(lambda: all_free(llm))
        assert llm.stats().generated_tokens < 400
        assert len(tokens_of(await read(llm.generate(request("next", "hello"))))) == 8
        await llm.close()

    with gated_llm() as (llm, gate):
        asyncio.run(leave())
        gate.open()
        asyncio.run(go_on())


def test_clients_that_come_and_go_at_random_leave_nothing_behind():
    async def test(llm, gate):
        expected = {}
        for length in range(1, 6):
            expected[length] = tokens_of(await read(llm.generate(request(f"q{length}", "x" * length, max_tokens=12))))

        async def client(number):
            length = number % 5 + 1
            stream = llm.generate(request(str(number), "x" * length, max_tokens=12))
            if number % 7 == 0:
                await asyncio.sleep(0)
                return
            outputs = []
            async for output in stream:
                outputs.append(output)
                if number % 3 == 0 and len(outputs) == 4:
                    return
            assert tokens_of(outputs) == expected[length]

        await asyncio.gather(*(client(number) for number in range(120)))
        await until(lambda: all_free(llm))

    with_llm(test, max_num_queued_requests=200, num_blocks=16, max_model_len=128)
