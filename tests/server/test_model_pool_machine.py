"""Whatever is asked of a pool in whatever order: the budget holds, nobody loses a model, all who wait are answered."""

import asyncio

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from virtual_loop import VirtualLoop

from kvarn.server.errors import ApiError
from kvarn.server.models import Lease, ModelPool, ModelState, PooledModel, PoolLimits

SIZES = {"a": 1, "b": 2, "c": 3, "d": 4}
BUDGET = 5
WAIT_SECONDS, MAX_WAITING = 60.0, 6
NAMES = st.sampled_from([*SIZES, "a-alias"])
KEEPS = st.sampled_from([None, None, 0.0, 7.0, float("inf")])


class World:
    """What is in memory, told by the loader and the models themselves."""

    def __init__(self) -> None:
        self.held: dict[str, FakeModel] = {}
        self.fails = False
        self.closings: list[str] = []

    async def load(self, name):
        assert name not in self.held, "loaded twice"
        self.held[name] = model = FakeModel(name, self)
        assert sum(SIZES[held] for held in self.held) <= BUDGET, "more in memory than the budget"
        await asyncio.sleep(2.0)
        if self.fails:
            del self.held[name]
            raise OSError("the file is gone")
        return model


class FakeModel:
    def __init__(self, name, world) -> None:
        self.name, self.world, self.is_running, self.users = name, world, True, 0

    async def close(self):
        assert not self.users, "unloaded under those who have it"
        await asyncio.sleep(0.5)
        assert not self.users, "given away while it was unloaded"
        del self.world.held[self.name]
        self.world.closings.append(self.name)


class PoolMachine(RuleBasedStateMachine):
    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.world = World()
        self.tasks: list[asyncio.Task] = []
        self.leases: list[Lease] = []
        models = [PooledModel(n, size, ("a-alias",) if n == "a" else ()) for n, size in SIZES.items()]
        limits = PoolLimits(MAX_WAITING, WAIT_SECONDS, 100.0)
        self.pool = ModelPool(models, self.world, budget=BUDGET, limits=limits)

    def run(self, seconds=0.0):
        """Lets time pass, and all come to rest that can without more of it."""

        async def rest():
            await asyncio.sleep(seconds)
            for _ in range(10):
                await asyncio.sleep(0)

        self.loop.run_until_complete(rest())

    @rule(target=requests, name=NAMES, keep=KEEPS)
    def ask(self, name, keep):
        async def request():
            lease = await self.pool.acquire(name, keep)
            assert lease.name == name.removesuffix("-alias")
            assert lease.hosted is self.world.held[lease.name]
            lease.hosted.users += 1
            self.leases.append(lease)
            return lease

        task = self.loop.create_task(request())
        task.asked = self.loop.time()
        self.tasks.append(task)
        self.run()
        return task

    @rule(task=consumes(requests))
    def give_back(self, task):
        """Whoever has it gives it back; whoever waits goes away."""
        self.tasks.remove(task)
        if not task.done():
            task.cancel()
        elif not task.cancelled() and task.exception() is None:
            self._release(task.result())
        self.run()

    def _release(self, lease):
        async def release():
            lease.hosted.users -= 1
            self.leases.remove(lease)
            lease.release()

        self.loop.run_until_complete(release())
        self.run()

    @rule(seconds=st.sampled_from([0.1, 0.5, 2.0, 5.0, 30.0, 150.0]))
    def wait(self, seconds):
        self.run(seconds)

    @rule(name=NAMES, load=st.booleans())
    def administer(self, name, load):
        self.tasks.append(self.loop.create_task(self._administered(self.pool.load if load else self.pool.unload, name)))
        self.run()

    @staticmethod
    async def _administered(work, name):
        await work(name)

    @rule(name=NAMES)
    def engine_stops(self, name):
        model = self.world.held.get(name.removesuffix("-alias"))
        if model is not None:
            model.is_running = False

    @rule(fails=st.booleans())
    def loads_fail(self, fails):
        self.world.fails = fails

    @invariant()
    def the_budget_holds(self):
        held = sum(SIZES[name] for name in self.world.held)
        assert held <= self.pool.held_bytes <= BUDGET

    @invariant()
    def what_somebody_has_is_there(self):
        for status in self.pool.statuses():
            users = sum(lease.name == status.name for lease in self.leases)
            assert status.in_flight == users
            if users:
                assert status.name in self.world.held

    @invariant()
    def waiting_is_bounded(self):
        assert sum(status.waiting for status in self.pool.statuses()) <= MAX_WAITING + 1
        for task in self.tasks:
            if hasattr(task, "asked") and not task.done():
                assert self.loop.time() <= task.asked + WAIT_SECONDS

    @invariant()
    def refusals_are_answers(self):
        for task in self.tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                assert isinstance(task.exception(), ApiError), task.exception()

    def teardown(self):
        """When all are done, all who waited were answered, and every model can be had again."""
        try:
            self.world.fails = False
            self.loop.set_exception_handler(lambda *_: None)
            while any(not task.done() for task in self.tasks) or self.leases:
                for lease in list(self.leases):
                    self._release(lease)
                self.run(20.0)
                assert self.loop.time() < 1e5
            self.run(11.0)
            for name in SIZES:
                self.loop.run_until_complete(self.pool.load(name))
                assert self.pool.status(name).state is ModelState.LOADED
            self.loop.run_until_complete(self.pool.close())
            assert not self.world.held
        finally:
            self.loop.close()


PoolMachine.TestCase.settings = settings(
    max_examples=250, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
test_pools = PoolMachine.TestCase
