"""`create_app`: routes over one engine. The engine may come later: until then all but the pages answers 503."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI

from kvarn import __version__
from kvarn.engine import AsyncLLM
from kvarn.request import Pooling
from kvarn.server import errors, openapi
from kvarn.server.auth import ApiKeys, Authentication
from kvarn.server.door import Doorway
from kvarn.server.http_numbers import HttpNumbers
from kvarn.server.models import ModelPool
from kvarn.server.models.hosted import HostedModel, given
from kvarn.server.routes.anthropic import add_anthropic_routes
from kvarn.server.routes.dashboard import add_dashboard
from kvarn.server.routes.embeddings import add_embedding_routes
from kvarn.server.routes.health import add_health
from kvarn.server.routes.metrics import add_metrics
from kvarn.server.routes.models import add_models
from kvarn.server.routes.openai import add_openai_routes
from kvarn.server.routes.pages import add_pages
from kvarn.server.routes.responses import add_response_routes
from kvarn.server.routes.service import add_service_routes
from kvarn.server.routes.tokens import add_token_routes
from kvarn.server.state import ServerState
from kvarn.server.watching import HttpWatcher, Watched

DEFAULT_MAX_BODY_BYTES = 8 << 20


def create_app(
    llm: AsyncLLM | None,
    *,
    served_model_names: Sequence[str] = (),
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    api_keys: Sequence[str] = (),
    models: ModelPool[HostedModel] | None = None,
    pooling: Pooling = Pooling.MEAN,
    watchers: Sequence[HttpWatcher] = (),
) -> FastAPI:
    """The application, which owns no engine. llm: the one that answers; None: none ever does, for tests.

    models: those that answer, in place of `llm` and its names, once `app.state.server.open()` is called.
    api_keys: see `ApiKeys`; without, everybody may ask. pooling: of embeddings whose request does not say.
    watchers: told of each request over HTTP. Raises ConfigError for a key that is none.
    """
    # No /docs: that page loads its scripts from elsewhere.
    app = FastAPI(title="kvarn", version=__version__, docs_url=None, redoc_url=None)
    state = app.state.server = ServerState(max_body_bytes, models or given(llm, served_model_names))
    if llm is not None:
        state.open()
    errors.install(app)
    app.add_middleware(Authentication, keys=ApiKeys(api_keys))
    app.add_middleware(Doorway, door=state.door)
    http = HttpNumbers()
    app.add_middleware(Watched, watchers=(http, *watchers))  # the last one added is the outermost
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
