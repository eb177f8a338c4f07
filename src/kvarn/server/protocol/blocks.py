"""Reading blocks of content as clients send them: every error names the part at fault."""

from __future__ import annotations

from typing import Any

from kvarn.server.errors import ApiError


def kind_of(block: Any, where: str) -> str:
    """Its type. Raises ApiError."""
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str):
        raise wrong(where, "must be an object with a type")
    return kind


def string(block: dict[str, Any], name: str, where: str) -> str:
    """One of its texts. Raises ApiError."""
    value = block.get(name)
    if not isinstance(value, str):
        raise wrong(f"{where}.{name}", "must be a string")
    return value


def only(block: dict[str, Any], where: str, known: tuple[str, ...]) -> None:
    """Refuses what would be lost without a word. Raises ApiError."""
    lost = next((name for name in block if name not in known), None)
    if lost is not None:
        path = f"{where}.{lost[:64]}"
        raise ApiError(400, f"unknown parameter {path}", param=path, code="unknown_parameter")


def unknown(where: str, kind: str, wanted: str) -> ApiError:
    """The refusal of a block of another type."""
    return unsupported(f"{where}.type", f"must be {wanted}, not {kind[:40]!r}: models here read text only")


def wrong(name: str, what: str) -> ApiError:
    """The refusal of a value."""
    return ApiError(400, f"{name} {what}", param=name, code="invalid_value")


def unsupported(name: str, what: str) -> ApiError:
    """The refusal of what is not there."""
    return ApiError(400, f"{name} {what}", param=name, code="unsupported_parameter")
