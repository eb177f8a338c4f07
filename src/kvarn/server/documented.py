"""What /openapi.json says of bodies that routes read themselves, to bound them while they arrive."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def documented(model: type[BaseModel]) -> dict[str, Any]:
    """The body's schema, as `openapi_extra` of a route."""
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
