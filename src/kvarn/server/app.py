"""`create_app`: routes over one engine. The engine may come later: until then all but the pages answers 503."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI

from kvarn import __version__
from kvarn.engine import AsyncLLM
from kvarn.server import errors
from kvarn.server.auth import ApiKeys, Authentication
from kvarn.server.http_numbers import HttpCounting, HttpNumbers
from kvarn.server.routes.dashboard import add_dashboard
from kvarn.server.routes.metrics import add_metrics
from kvarn.server.routes.openai import add_openai_routes
from kvarn.server.routes.pages import add_pages
from kvarn.server.routes.service import add_service_routes
from kvarn.server.state import ServerState

DEFAULT_MAX_BODY_BYTES = 8 << 20


def create_app(
    llm: AsyncLLM | None,
    *,
    served_model_names: Sequence[str] = (),
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    api_keys: Sequence[str] = (),
) -> FastAPI:
    """The application, which does not own the engine. Where it is None, `app.state.server.open(llm, names)` follows.

    api_keys: see `ApiKeys`; without, everybody may ask. Raises ConfigError for a key that is none.
    """
    # No /docs: that page loads its scripts from elsewhere.
    app = FastAPI(title="kvarn", version=__version__, docs_url=None, redoc_url=None)
    state = app.state.server = ServerState(max_body_bytes)
    if llm is not None:
        state.open(llm, served_model_names)
    errors.install(app)
    app.add_middleware(Authentication, keys=ApiKeys(api_keys))
    http = HttpNumbers()
    app.add_middleware(HttpCounting, numbers=http)  # the last one added is the outermost
    add_service_routes(app, state)
    add_metrics(app, state, http)
    add_openai_routes(app, state)
    add_dashboard(app, state)
    add_pages(app)
    return app
