"""The administrator's routes: draining, and which models are in memory."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kvarn.server import errors
from kvarn.server.front import Front
from kvarn.server.limits import ServerLimits
from kvarn.server.models import ModelPool, PooledModel
from kvarn.server.routes.life import add_life_routes
from kvarn.server.state import ServerState


class Model:
    is_running = True

    async def close(self):
        pass


class Loader:
    async def load(self, name):
        if name == "broken":
            raise OSError("secret")
        return Model()


@pytest.fixture
def admin():
    """A client of the admin routes over two models, of which one cannot be loaded."""
    app = FastAPI()
    errors.install(app)
    models = ModelPool([PooledModel("a", 5, ("x/y",)), PooledModel("broken", 3)], Loader(), budget=6)
    state = ServerState(ServerLimits(), models)
    app.add_middleware(Front, state=state, quiet=())
    add_life_routes(app, state)
    with TestClient(app) as client:
        yield client


def states(admin):
    listed = admin.get("/admin/models").json()
    assert listed["budget_bytes"] == 6
    return {model["name"]: model["state"] for model in listed["models"]}, listed["held_bytes"]


def test_models_are_loaded_unloaded_and_listed(admin):
    assert states(admin) == ({"a": "unloaded", "broken": "unloaded"}, 0)
    loaded = admin.post("/admin/models/x/y/load")
    assert (loaded.status_code, loaded.json()["state"], loaded.json()["loads"]) == (200, "loaded", 1)
    assert loaded.json()["keep_seconds"] is None
    assert states(admin) == ({"a": "loaded", "broken": "unloaded"}, 5)
    assert admin.post("/admin/models/a/unload").json()["state"] == "unloaded"
    assert states(admin) == ({"a": "unloaded", "broken": "unloaded"}, 0)
    assert admin.post("/admin/models/none/load").status_code == 404


def test_a_load_that_fails_is_told_without_secrets(admin):
    failed = admin.post("/admin/models/broken/load")
    assert failed.status_code == 503
    assert "cannot be loaded: internal error" in failed.json()["error"]["message"]
    assert "secret" not in failed.text
    assert states(admin)[0]["broken"] == "failed"


def test_draining_and_going_on(admin):
    assert admin.get("/admin/drain").json() == {"draining": False, "in_flight": 0}
    assert admin.post("/admin/drain").json() == {"draining": True, "in_flight": 0}
    assert admin.post("/admin/drain?wait=true").json() == {"draining": True, "in_flight": 0}
    assert admin.get("/admin/drain").json() == {"draining": True, "in_flight": 0}
    assert admin.post("/admin/resume").json() == {"draining": False, "in_flight": 0}
