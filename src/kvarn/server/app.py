"""`create_app`: routes over one engine. The engine may come later: until then all but the pages answers 503."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI

from kvarn import __version__
from kvarn.engine import AsyncLLM
from kvarn.request import Pooling
from kvarn.server import errors, openapi
from kvarn.server.auth import Authentication
from kvarn.server.cors import add_cors
from kvarn.server.door import Doorway
from kvarn.server.front import Front
from kvarn.server.http_numbers import HttpNumbers
from kvarn.server.keys.ring import KeyRing
from kvarn.server.limits import ServerLimits
from kvarn.server.models import ModelPool
from kvarn.server.models.hosted import HostedModel, given
from kvarn.server.routes.anthropic import add_anthropic_routes
from kvarn.server.routes.dashboard import add_dashboard
from kvarn.server.routes.embeddings import add_embedding_routes
from kvarn.server.routes.health import add_health
from kvarn.server.routes.metrics import add_metrics
from kvarn.server.routes.models import add_models
from kvarn.server.routes.openai import add_openai_routes
from kvarn.server.routes.pages import PAGES, add_pages
from kvarn.server.routes.responses import add_response_routes
from kvarn.server.routes.service import add_service_routes
from kvarn.server.routes.tokens import add_token_routes
from kvarn.server.state import ServerState
from kvarn.server.watching import HttpWatcher, Watched

QUIET = ("/health", "/health/live", "/health/ready", "/metrics")
"""Paths that are logged only where they fail, as the pages."""


def create_app(
    llm: AsyncLLM | None,
    *,
    served_model_names: Sequence[str] = (),
    limits: ServerLimits | None = None,
    api_keys: Sequence[str] = (),
    keys: KeyRing | None = None,
    metrics_open: bool = False,
    cors_origins: Sequence[str] = (),
    models: ModelPool[HostedModel] | None = None,
    pooling: Pooling = Pooling.MEAN,
    watchers: Sequence[HttpWatcher] = (),
    watchdog_seconds: float = 0.0,
) -> FastAPI:
    """The application, which owns no engine. llm: the one that answers; None: none ever does, for tests.

    models: those that answer, in place of `llm` and its names, once `app.state.server.open()` is called.
    keys: who may ask; None: `api_keys`, or everybody where there are none. metrics_open: /metrics needs no key.
    cors_origins: of pages that may ask. pooling: of embeddings whose request does not say. watchers: told of each
    request over HTTP. watchdog_seconds: see `ServeOptions`. Raises ConfigError for a key that is none.
    """
    # No /docs: that page loads its scripts from elsewhere.
    app = FastAPI(title="kvarn", version=__version__, docs_url=None, redoc_url=None)
    state = app.state.server = ServerState(
        limits or ServerLimits(), models or given(llm, served_model_names), watchdog_seconds=watchdog_seconds
    )
    if llm is not None:
        state.open()
    errors.install(app)
    open_paths = {*PAGES, "/metrics"} if metrics_open else {*PAGES}
    app.add_middleware(Authentication, keys=KeyRing(api_keys) if keys is None else keys, open_paths=open_paths)
    app.add_middleware(Doorway, door=state.door)
    app.add_middleware(Front, state=state, quiet={*PAGES, *QUIET})
    http = HttpNumbers()
    app.add_middleware(Watched, watchers=(http, *watchers))
    if cors_origins:
        add_cors(app, cors_origins)  # the last one added is the outermost
    add_health(app, state)
    add_models(app, state)
    add_service_routes(app)
    add_metrics(app, state, http)
    add_openai_routes(app, state)
    add_anthropic_routes(app, state)
    add_response_routes(app, state)
    add_embedding_routes(app, state, pooling)
    add_token_routes(app, state)
    add_dashboard(app, state)
    add_pages(app)
    openapi.install(app)
    return app
