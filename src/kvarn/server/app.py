"""`create_app`: routes over one engine. The engine may come later: until then all but /health answers 503."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel

from kvarn import __version__
from kvarn.engine import AsyncLLM
from kvarn.server import chat, completions, errors
from kvarn.server.body import parse, read_json
from kvarn.server.errors import ApiError
from kvarn.server.generation import Generation, new_id, unless_disconnected
from kvarn.server.protocol import ChatCompletionRequest, CompletionRequest, SamplingRequest, screen
from kvarn.server.sse import EventStream

STATIC = Path(__file__).with_name("static")
PAGES = {"/": "index.html", "/chat.js": "chat.js", "/markdown.js": "markdown.js", "/style.css": "style.css"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
DEFAULT_MAX_BODY_BYTES = 8 << 20
T = TypeVar("T")
Body = TypeVar("Body", bound=SamplingRequest)


class ServerState:
    """What routes share. llm: None while the model loads; failure: why it never will be there."""

    def __init__(self, names: tuple[str, ...], max_body_bytes: int) -> None:
        self.names = names
        self.max_body_bytes = max_body_bytes
        self.llm: AsyncLLM | None = None
        self.created = int(time.time())

    def ready(self) -> AsyncLLM:
        """The engine. Raises ApiError 503 while there is none or it has failed."""
        if self.llm is None:
            raise ApiError(503, "the model is loading", code="loading", headers={"Retry-After": "1"})
        if not self.llm.is_running:
            raise ApiError(503, "the engine has stopped", code="engine_stopped")
        return self.llm

    def check_model(self, name: str | None) -> str:
        """The served name for the model that a request names. Raises ApiError 404."""
        if name is None or name in self.names:
            return name or self.names[0]
        known = ", ".join(self.names)
        raise ApiError(
            404, f"the model {name[:200]!r} is not served here ({known} is)", param="model", code="model_not_found"
        )


def create_app(
    llm: AsyncLLM | None, *, served_model_name: str | None = None, max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
) -> FastAPI:
    """The application. `app.state.server.llm` may be set later where `llm` is None. The app does not own the engine."""
    app = FastAPI(title="kvarn", version=__version__, docs_url="/docs", redoc_url=None)
    own = llm.model_name if llm is not None else None
    names = tuple(dict.fromkeys(name for name in (served_model_name, own) if name)) or ("model",)
    state = app.state.server = ServerState(names, max_body_bytes)
    state.llm = llm
    errors.install(app)
    _add_service_routes(app, state)
    _add_generation_routes(app, state)
    _add_pages(app)
    return app


def _add_service_routes(app: FastAPI, state: ServerState) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 once requests are answered, 503 before and after."""
        state.ready()
        return JSONResponse({"status": "ok"})

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The server's version."""
        return {"version": __version__}

    def model_card(name: str) -> dict[str, Any]:
        llm = state.ready()
        return {"id": name, "object": "model", "created": state.created, "owned_by": "kvarn",
                "max_model_len": llm.max_model_len}  # fmt: skip

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The served model, under each of its names."""
        return {"object": "list", "data": [model_card(name) for name in state.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        return model_card(state.check_model(name))


def _add_generation_routes(app: FastAPI, state: ServerState) -> None:
    async def prepare(request: Request, kind: type[Body]) -> tuple[AsyncLLM, Body, str]:
        llm = state.ready()
        body = parse(kind, screen(await read_json(request, state.max_body_bytes)))
        return llm, body, state.check_model(body.model)

    async def answer(request: Request, builder: Any, stream: bool | None) -> Response:
        if stream:
            return await EventStream.begin(builder.stream())
        return JSONResponse(await unless_disconnected(request, builder.whole()))

    @app.post("/v1/chat/completions", openapi_extra=_documented(ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        """An answer to a conversation, whole or as a stream of server-sent events."""
        llm, body, name = await prepare(request, ChatCompletionRequest)
        sampling = body.to_sampling()
        ids = await _in_thread(lambda: chat.prompt_ids(llm.tokenizer, body))
        generation = Generation(llm, [ids], sampling, new_id("chatcmpl"))
        return await answer(request, chat.ChatAnswer(body, generation, llm.tokenizer, name), body.stream)

    @app.post("/v1/completions", openapi_extra=_documented(CompletionRequest))
    async def text_completions(request: Request) -> Response:
        """The continuation of one or several texts, whole or as a stream of server-sent events."""
        llm, body, name = await prepare(request, CompletionRequest)
        sampling = body.to_sampling()
        prompts = await _in_thread(lambda: completions.prompt_ids(llm.tokenizer, body))
        generation = Generation(llm, prompts, sampling, new_id("cmpl"))
        return await answer(request, completions.CompletionAnswer(body, generation, llm.tokenizer, name), body.stream)


async def _in_thread(work: Callable[[], T]) -> T:
    """Tokenizing and templates can take long for a large prompt: not on the event loop."""
    return await asyncio.get_running_loop().run_in_executor(None, work)


def _documented(model: type[BaseModel]) -> dict[str, Any]:
    """The body's schema for /openapi.json; routes read the body themselves, to bound it while it arrives."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    text = {"application/json": {"schema": _inline(schema, definitions)}}
    return {"requestBody": {"required": True, "content": text}}


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inline(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
        return {key: _inline(value, definitions) for key, value in schema.items()}
    if isinstance(schema, list):
        return [_inline(value, definitions) for value in schema]
    return schema


def _add_pages(app: FastAPI) -> None:
    def page(file: str) -> Callable[[], FileResponse]:
        return lambda: FileResponse(STATIC / file, headers=PAGE_HEADERS)

    for path, file in PAGES.items():
        app.add_api_route(path, page(file), methods=["GET"], include_in_schema=False, response_class=FileResponse)
