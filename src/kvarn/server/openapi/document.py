"""The document of /openapi.json: FastAPI's, with what routes take and answer, which they read and write themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from kvarn.server.openapi.fields import Schema, refined
from kvarn.server.openapi.operations import OPERATIONS, Operation

REF = "#/components/schemas/{model}"
BODY_ERRORS = {
    "403": "The API key does not allow what is asked for.",
    "400": "The body is no JSON, or a parameter is wrong, unknown or not supported; the message names it.",
    "413": "The body is too large.",
    "415": "The body is not application/json.",
    "429": "Too much is to be done; Retry-After says when to come again.",
}
ERRORS = {
    "401": "The API key is missing or wrong.",
    "404": "There is no such route or model.",
    "500": "The engine failed; the message has an id that the log has too.",
    "503": "The model is loading, or the engine has stopped.",
    "default": "Any other error, in the same form.",
}
EVENT: Schema = {
    "type": "object",
    "description": "One server-sent event; its data is JSON, or [DONE] where the API ends its streams so.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def document_of(app: FastAPI) -> dict[str, Any]:
    """The document of the app's routes; those that `OPERATIONS` has not are as FastAPI describes them."""
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    models = {operation.body for operation in OPERATIONS.values() if operation.body is not None}
    modes: list[Any] = [(model, "validation") for model in sorted(models, key=lambda model: model.__name__)]
    _, schemas = models_json_schema(modes, ref_template=REF)
    components = schemas["$defs"]
    for path, methods in found["paths"].items():
        operation = OPERATIONS.get(path)
        for described in methods.values() if operation is not None else ():
            assert operation is not None
            _describe(described, operation, components)
    found["components"] = {"schemas": components, "securitySchemes": SCHEMES}
    found["security"] = [{}, {"bearer": []}, {"x-api-key": []}]
    return found


def _describe(described: dict[str, Any], operation: Operation, components: dict[str, Schema]) -> None:
    content: dict[str, Any] = {operation.media_type: {"schema": operation.reply}}
    if operation.streams:
        content["text/event-stream"] = {"schema": EVENT}
    error = {"application/json": {"schema": operation.error}}
    texts = {**(BODY_ERRORS if operation.body is not None else {}), **ERRORS}
    described["responses"] = {
        "200": {"description": "The answer.", "content": content},
        **{status: {"description": text, "content": error} for status, text in texts.items()},
    }
    if operation.body is not None:
        name = operation.body.__name__
        components[name] = {**refined(components[name], operation.body, operation.bounds), **operation.also}
        schema = {"$ref": REF.format(model=name)}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
