"""`create_app`: routes over one engine. The engine may come later: until then all but the pages answers 503."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from kvarn import __version__
from kvarn.engine import AsyncLLM
from kvarn.errors import RequestError
from kvarn.server import errors
from kvarn.server.auth import ApiKeys, Authentication
from kvarn.server.body import parse, read_body
from kvarn.server.caller import Caller
from kvarn.server.chat import ChatAnswer
from kvarn.server.completions import CompletionAnswer
from kvarn.server.generation import Generation, new_id
from kvarn.server.metrics import exposition
from kvarn.server.protocol import ChatCompletionRequest, CompletionRequest
from kvarn.server.sse import EventStream, unless_disconnected
from kvarn.server.state import ServerState
from kvarn.server.tools import ToolUse

PAGES = {
    "/": ("index.html", "text/html"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/markdown.js": ("markdown.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
"""Path to file and type."""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
DEFAULT_MAX_BODY_BYTES = 8 << 20

_Understood = tuple[ChatAnswer | CompletionAnswer, bool]
"""An answer to be, and whether it is streamed."""


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

    @app.get("/metrics")
    async def metrics() -> Response:
        """Numbers of the engine for Prometheus."""
        body = exposition(state.ready().stats(), state.names[0])
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")

    def card(name: str) -> dict[str, Any]:
        length = state.ready().max_model_len
        return {"id": name, "object": "model", "created": state.created, "owned_by": "kvarn", "max_model_len": length}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The served model, under each of its names."""
        state.ready()
        return {"object": "list", "data": [card(name) for name in state.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        state.ready()
        return card(state.check_model(name))


def _add_generation_routes(app: FastAPI, state: ServerState) -> None:
    async def answer(request: Request, understand: Callable[[AsyncLLM, Caller, bytes], _Understood]) -> Response:
        llm, caller = state.ready(), Caller.of(request)
        data = await read_body(request, state.max_body_bytes)
        return await _answered(request, *await state.in_thread(lambda: understand(llm, caller, data)))

    def chat(llm: AsyncLLM, caller: Caller, data: bytes) -> _Understood:
        body = parse(ChatCompletionRequest, data)
        name = state.check_model(body.model)
        tools = ToolUse.of(body.tools, body.tool_choice, body.parallel_tool_calls, llm.tokenizer)
        generation = _generation(llm, caller, state.prompts.chat(body, tools), body, "chatcmpl", tools)
        return ChatAnswer(body, generation, llm.tokenizer, name, tools), bool(body.stream)

    def completion(llm: AsyncLLM, caller: Caller, data: bytes) -> _Understood:
        body = parse(CompletionRequest, data)
        name = state.check_model(body.model)
        generation = _generation(llm, caller, state.prompts.completion(body), body, "cmpl")
        return CompletionAnswer(body, generation, llm.tokenizer, name), bool(body.stream)

    @app.post("/v1/chat/completions", openapi_extra=_documented(ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        """An answer to a conversation, whole or as a stream of server-sent events."""
        return await answer(request, chat)

    @app.post("/v1/completions", openapi_extra=_documented(CompletionRequest))
    async def text_completions(request: Request) -> Response:
        """The continuation of one or several texts, whole or as a stream of server-sent events."""
        return await answer(request, completion)


def _generation(
    llm: AsyncLLM,
    caller: Caller,
    prompts: Iterator[Sequence[int]],
    body: ChatCompletionRequest | CompletionRequest,
    kind: str,
    tools: ToolUse | None = None,
) -> Generation:
    """What the body asks for. Raises ApiError, parameters named as the client spelt them."""
    try:
        sampling = body.to_sampling()
        if tools is not None:
            sampling = tools.bind(sampling)
        return Generation(
            llm, prompts, sampling, new_id(kind), caller, priority=body.priority or 0, cache_salt=body.salt,
            refusal=body.refusal,
        )  # fmt: skip
    except RequestError as error:
        raise body.refusal(error) from None


async def _answered(request: Request, answer: ChatAnswer | CompletionAnswer, stream: bool) -> Response:
    """Runs it, for as long as the client is there."""
    if stream:
        return await unless_disconnected(request.receive, EventStream.begin(answer.stream()))
    return JSONResponse(await unless_disconnected(request.receive, answer.whole()))


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
    def page(file: str, kind: str) -> Callable[[], Awaitable[Response]]:
        content = files("kvarn.server").joinpath("static", file).read_bytes()

        async def answer() -> Response:
            return Response(content, media_type=kind, headers=PAGE_HEADERS)

        return answer

    for path, (file, kind) in PAGES.items():
        app.add_api_route(path, page(file, kind), methods=["GET"], include_in_schema=False)
