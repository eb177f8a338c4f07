"""`Caller`: what the headers of a request say of who asks, and of how soon the answer is wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

from fastapi import Request

from kvarn.server.errors import ApiError
from kvarn.server.keys.account import OpenAccount, Visit
from kvarn.server.limits import ServerLimits
from kvarn.server.load import TenantLoads
from kvarn.server.record import RequestRecord, request_id_of
from kvarn.server.request_trace import UNTRACED, RequestTrace

DEADLINE_HEADERS = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms")
"""Kubernetes' Gateway API Inference Extension and llm-d name the header so."""


@dataclass(frozen=True, slots=True)
class Caller:
    """tenant: of the API key; empty where no keys are set. ttft_slo_ms: None where the caller does not say.

    record: to be told of what is done for the request. limits: of what it may ask for. visit: what it takes of its
    key's account. trace: hears how the answer gets on. loads: of all tenants, to be told what its requests do.
    """

    tenant: str = ""
    ttft_slo_ms: float | None = None
    record: RequestRecord = field(default_factory=lambda: RequestRecord(request_id_of(None)))
    limits: ServerLimits = field(default_factory=ServerLimits)
    visit: Visit = field(default_factory=lambda: OpenAccount().begin())
    trace: RequestTrace = UNTRACED
    loads: TenantLoads = field(default_factory=TenantLoads, repr=False, compare=False)

    @classmethod
    def of(cls, request: Request) -> Self:
        """From a request that has passed `Authentication`. Raises ApiError 400 for a deadline that is no time."""
        found = next((name for name in DEADLINE_HEADERS if name in request.headers), None)
        slo = None if found is None else _milliseconds(found, request.headers[found])
        visit: Visit = request.state.visit
        trace, server = getattr(request.state, "trace", UNTRACED), request.app.state.server
        return cls(visit.account.tenant, slo, request.state.record, server.limits, visit, trace, server.loads)


def _milliseconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        message = f"the header {name} must be a number of milliseconds above 0, not {text[:40]!r}"
        raise ApiError(400, message, param=name, code="invalid_value")
    return value
