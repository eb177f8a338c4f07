"""The pages: files of this package, served as they are. They hold no data, so they need no key; what they show does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha256
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.responses import Response

PAGES = {"/": "index.html", "/dashboard": "dashboard.html"}
"""Path to file. Their modules and styles are under `/static/`."""
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_pages(app: FastAPI) -> None:
    """Adds a route for each page and each file that pages load."""
    folder = files("kvarn.server").joinpath("static")
    names = sorted(entry.name for entry in folder.iterdir())
    paths = {**PAGES, **{f"/static/{name}": name for name in names if name.endswith((".js", ".css"))}}
    for path, name in paths.items():
        answer = _file(folder.joinpath(name).read_bytes(), TYPES[name[name.rindex(".") :]])
        app.add_api_route(path, answer, methods=["GET"], include_in_schema=False)


def _file(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    """A route that sends a file, or says that the browser's copy is still good."""
    tag = f'"{sha256(content).hexdigest()[:16]}"'
    headers = {**PAGE_HEADERS, "ETag": tag}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return answer
