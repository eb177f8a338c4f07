"""OpenTelemetry spans of requests. Imported with `--otlp-endpoint` only; needs the extra `otel`.

    POST /v1/chat/completions              from the first byte to the last; child of the caller's span (traceparent)
      chat smollm2-135m-instruct           one for each of the engine's requests, with gen_ai attributes
        queue │ prefill │ decode

Spans are made when a request ends, from the times that its last output brings (`RequestTimes`), and leave in batches,
in a thread of the SDK's; what does not fit into its queue is dropped. So neither the engine nor a stream waits for a
collector. No span holds text of prompts or answers, nor who sent them.

Names are those of OpenTelemetry's semantic conventions for HTTP and generative AI, and vLLM's for latencies.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Self

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.types import Scope

from kvarn import __version__
from kvarn.request import Request, RequestOutput, RequestTimes

TRACED = "/v1/"
"""Where paths of routes begin that generate; probes and scrapes would be noise."""
OPERATIONS = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}
"""gen_ai.operation.name of routes that are no chat."""
PROPAGATED = (b"traceparent", b"tracestate")
MAX_QUEUED_SPANS = 4096
EXPORT_SECONDS = 5.0
"""For one batch, retries among it."""
CLOSING_SECONDS = 5.0
"""For all that are left at the end."""


class SpanWatcher:
    """Makes spans of requests over HTTP: an `HttpWatcher`."""

    def __init__(self, provider: TracerProvider) -> None:
        """provider: owned."""
        self._provider = provider
        self._tracer = provider.get_tracer("kvarn", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def exporting_to(cls, url: str) -> Self:
        """Sends spans to a collector over OTLP/HTTP. url: where it takes traces.

        OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER and OTEL_EXPORTER_OTLP_HEADERS are honoured, as the SDK does.
        """
        told = OTELResourceDetector().detect()  # OTEL_SERVICE_NAME among it
        resource = Resource.create({SERVICE_NAME: "kvarn", SERVICE_VERSION: __version__}).merge(told)
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=url, timeout=EXPORT_SECONDS)
        provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=MAX_QUEUED_SPANS))
        return cls(provider)

    def begun(self, scope: Scope) -> HttpTrace | Unwatched:
        """Begins the span of a request that a caller or the sampler wants."""
        if not scope["path"].startswith(TRACED):
            return Unwatched()
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in PROPAGATED}
        context = self._propagator.extract(headers)
        span = self._tracer.start_span(scope["method"], context, SpanKind.SERVER)
        if not span.is_recording():
            return Unwatched()
        trace = HttpTrace(self._tracer, span, OPERATIONS.get(scope["path"], "chat"))
        scope.setdefault("state", {})["trace"] = trace
        return trace

    def close(self) -> None:
        """Sends what is left, for `CLOSING_SECONDS` at most. Nothing may be watched any more."""
        # The SDK's own end waits for half a minute where the collector hangs.
        end = threading.Thread(target=self._provider.shutdown, name="kvarn-spans-end", daemon=True)
        end.start()
        end.join(CLOSING_SECONDS)


class Unwatched:
    """Of a request that has no span."""

    def ended(self, route: str, method: str, status: int) -> None:
        """Nothing."""


@dataclass(slots=True)
class _Progress:
    """What one of the engine's requests has said so far."""

    model: str
    request: Request
    began: float
    tokens: int = 0
    reasons: list[str] = field(default_factory=list)


class HttpTrace:
    """The span of one request over HTTP and those below it: a `Watch` and a `RequestTrace`."""

    def __init__(self, tracer: Tracer, span: Span, operation: str) -> None:
        """span: begun; ended by `ended`."""
        self._tracer = tracer
        self._span = span
        self._operation = operation
        self._began = time.perf_counter()
        self._epoch = time.time_ns() - round(self._began * 1e9)
        """Nanoseconds from the epoch to the zero of the engine's clock."""
        self._progress: dict[str, _Progress] = {}

    def output(self, model: str, request: Request, output: RequestOutput) -> None:
        """Counts; makes the spans of the engine's request with its last output."""
        progress = self._progress.get(request.request_id)
        if progress is None:
            progress = self._progress[request.request_id] = _Progress(model, request, self._began)
        for part in output.outputs:
            progress.tokens += len(part.token_ids)
            if part.finish_reason is not None:
                progress.reasons.append(part.finish_reason.value)
        if output.finished:
            del self._progress[request.request_id]
            self._generated(progress, output)

    def ended(self, route: str, method: str, status: int) -> None:
        """Ends the span, and those of requests of which no last output came: their client left, or they failed."""
        now = time.perf_counter()
        for progress in self._progress.values():
            attributes = _asked(self._operation, progress.model, progress.request)
            attributes |= {"gen_ai.usage.output_tokens": progress.tokens, "error.type": "broken_off"}
            span = self._child(self._span, f"{self._operation} {progress.model}", progress.began, attributes)
            span.set_status(Status(StatusCode.ERROR, "ended before its last token was sent"))
            span.end(self._ns(now))
        self._span.update_name(f"{method} {route}")
        self._span.set_attributes(
            {"http.request.method": method, "http.route": route, "http.response.status_code": status}
        )
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(self._ns(now))

    def _generated(self, progress: _Progress, output: RequestOutput) -> None:
        times = output.times
        if times is None:
            return  # never queued
        attributes = _asked(self._operation, progress.model, progress.request) | _answered(progress, output, times)
        span = self._child(self._span, f"{self._operation} {progress.model}", times.arrived, attributes)
        marks = (times.arrived, times.started, times.first_token, times.ended)
        for name, begin, end in zip(("queue", "prefill", "decode"), marks, marks[1:], strict=False):
            if begin is not None:
                self._child(span, name, begin, {}).end(self._ns(times.ended if end is None else end))
        span.end(self._ns(times.ended))

    def _child(self, parent: Span, name: str, began: float, attributes: dict[str, AttributeValue]) -> Span:
        context = set_span_in_context(parent)
        return self._tracer.start_span(name, context, attributes=attributes, start_time=self._ns(began))

    def _ns(self, seconds: float) -> int:
        return self._epoch + round(seconds * 1e9)


def _asked(operation: str, model: str, request: Request) -> dict[str, AttributeValue]:
    sampling = request.sampling
    asked: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "kvarn",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": request.request_id,
        "gen_ai.request.choice.count": sampling.n,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
    }
    return {name: value for name, value in asked.items() if value is not None}


def _answered(progress: _Progress, output: RequestOutput, times: RequestTimes) -> dict[str, AttributeValue]:
    answered: dict[str, AttributeValue | None] = {
        "gen_ai.response.finish_reasons": progress.reasons,
        "gen_ai.usage.output_tokens": progress.tokens,
        "gen_ai.usage.cache_read.input_tokens": output.num_cached_tokens,
        "gen_ai.latency.time_in_queue": times.queue_seconds,
        "gen_ai.latency.time_to_first_token": None if times.first_token is None else times.first_token - times.arrived,
        "gen_ai.latency.e2e": times.seconds,
    }
    return {name: value for name, value in answered.items() if value is not None}
