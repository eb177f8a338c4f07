"""`create_app`: routes over one engine. The engine may come later: until then all but the pages answers 503."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI

from kvarn import __version__
from kvarn.engine import AsyncLLM
from kvarn.server import errors
from kvarn.server.auth import ApiKeys, Authentication
from kvarn.server.http_numbers import HttpCounting, HttpNumbers
from kvarn.server.routes.metrics import add_metrics
