"""Whose cached prefixes are whose."""

from __future__ import annotations

Salt = tuple[str, str]
"""The request's (tenant, cache_salt). What one salt has computed is not there for any other."""
