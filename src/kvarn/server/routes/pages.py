"""The pages: files of this package, served as they are. They hold no data, so they need no key; what they show does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from importlib.resources import files
from types import MappingProxyType

from fastapi import FastAPI, Request
from fastapi.responses import Response

FILES = (
    "answer.js", "api.js", "base.css", "chart.js", "chat.css", "chat.js", "copy.js", "dashboard.css", "dashboard.js",
    "format.js", "history.js", "inline.js", "key.js", "markdown.js", "mill.svg", "settings.js", "sidebar.js",
    "store.js", "tables.js", "theme.js", "view.js",
)  # fmt: skip
"""What the pages load."""
PAGES: Mapping[str, str] = MappingProxyType(
    {"/": "index.html", "/dashboard": "dashboard.html", **{f"/static/{name}": name for name in FILES}}
)
"""Path to file."""
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_pages(app: FastAPI) -> None:
    """Adds a route for each of `PAGES`."""
    folder = files("kvarn.server").joinpath("static")
    for path, name in PAGES.items():
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
