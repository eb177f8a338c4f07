"""The pages: files of this package, served as they are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response

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


def add_pages(app: FastAPI) -> None:
    """Adds a route for each of `PAGES`."""

    def page(file: str, kind: str) -> Callable[[], Awaitable[Response]]:
        content = files("kvarn.server").joinpath("static", file).read_bytes()

        async def answer() -> Response:
            return Response(content, media_type=kind, headers=PAGE_HEADERS)

        return answer

    for path, (file, kind) in PAGES.items():
        app.add_api_route(path, page(file, kind), methods=["GET"], include_in_schema=False)
