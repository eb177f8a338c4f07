"""Reading a request's body: bounded while it arrives, JSON, and validated with errors that name the field."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from kvarn.server.errors import ApiError

Model = TypeVar("Model", bound=BaseModel)
MAX_NESTING = 64


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """The body as a JSON object of at most `limit` bytes. Raises ApiError 400, 413 or 415."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be application/json, not {kind[:100]}", code="unsupported_media_type")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(400, "the body is nested too deep", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes (--max-body-bytes)", code="body_too_large")


def parse(model: type[Model], values: dict[str, Any]) -> Model:
    """The values as a request model. Raises ApiError 400 naming the first field at fault."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = _path(first["loc"])
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"unknown parameter {path}", param=path, code="unknown_parameter") from None
        given = first.get("input")
        shown = "" if first["type"] == "missing" else f", not {json.dumps(given, default=str)[:80]}"
        raise ApiError(400, f"{path}: {_plain(first['msg'])}{shown}", param=path, code="invalid_type") from None


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` from pydantic's location; names of union members are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool", "list", "dict"):
            path += f".{part}" if path else part
    return path or "body"


def _plain(message: str) -> str:
    return (
        message.removeprefix("Value error, ").replace("Input should be", "must be").replace("Field required", "missing")
    )
