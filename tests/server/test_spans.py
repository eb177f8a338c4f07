"""OpenTelemetry spans: what is in them, who gets them, and that nobody waits for a collector."""

import contextlib
import itertools
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from gated_engine import PATIENCE, Broken, gated_llm
from live_server import posted, serving, wait_until
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from kvarn.errors import ConfigError
from kvarn.server.otlp import exported_spans, traces_url
from kvarn.server.spans import SpanWatcher

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "four", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def exporter():
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def watcher(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return SpanWatcher(provider)


@pytest.fixture(scope="module")
def traced_url(llm, watcher):
    with serving(llm, served_model_names=("served",), watchers=(watcher,)) as url:
        yield url


@pytest.fixture
def spans(exporter):
    """Waits for the spans of one request: its root is the last that ends. By name, each a list."""
    exporter.clear()

    def gathered():
        wait_until(lambda: any(span.kind is SpanKind.SERVER for span in exporter.get_finished_spans()))
        found = {}
        for span in exporter.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return found

    return gathered


def seconds(span):
    return (span.end_time - span.start_time) / 1e9


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_and_its_phases(traced_url, spans, stream, llm):
    began = time.time_ns()
    assert httpx.post(traced_url + COMPLETIONS, json={**BODY, "stream": stream}).status_code == 200
    found = spans()
    assert set(found) == {f"POST {COMPLETIONS}", f"text_completion {llm.model_name}", "queue", "prefill", "decode"}
    (root,), (request,) = found[f"POST {COMPLETIONS}"], found[f"text_completion {llm.model_name}"]
    phases = [found[name][0] for name in ("queue", "prefill", "decode")]
    assert root.parent is None
    assert request.parent.span_id == root.context.span_id
    assert {phase.parent.span_id for phase in phases} == {request.context.span_id}
    assert began <= root.start_time <= request.start_time == phases[0].start_time
    assert [p.end_time for p in phases[:-1]] == [p.start_time for p in phases[1:]]
    assert phases[-1].end_time == request.end_time <= root.end_time <= time.time_ns()
    assert dict(root.attributes) == {
        "http.request.method": "POST", "http.route": COMPLETIONS, "http.response.status_code": 200
    }  # fmt: skip


def test_attributes_of_a_request(traced_url, spans, llm):
    sent = {**BODY, "n": 2, "top_p": 0.5, "seed": 7, "frequency_penalty": 0.25, "cache_salt": "spans"}
    assert httpx.post(traced_url + COMPLETIONS, json=sent).status_code == 200
    (request,) = spans()[f"text_completion {llm.model_name}"]
    attributes = dict(request.attributes)
    latencies = [attributes.pop(f"gen_ai.latency.{name}") for name in ("time_in_queue", "time_to_first_token", "e2e")]
    assert 0 <= latencies[0] <= latencies[1] <= latencies[2]
    assert latencies[2] == pytest.approx(seconds(request), abs=1e-5)
    assert attributes.pop("gen_ai.response.id").startswith("cmpl-")
    cached = attributes.pop("gen_ai.usage.cache_read.input_tokens")
    assert 0 <= cached < 4
    assert attributes == {
        "gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "kvarn",
        "gen_ai.request.model": llm.model_name, "gen_ai.response.model": llm.model_name,
        "gen_ai.request.choice.count": 2, "gen_ai.request.max_tokens": 5, "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 0.5, "gen_ai.request.top_k": 0, "gen_ai.request.seed": 7,
        "gen_ai.request.frequency_penalty": 0.25, "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.usage.input_tokens": 4, "gen_ai.usage.output_tokens": 10,
        "gen_ai.response.finish_reasons": ("length", "length"),
    }  # fmt: skip


def test_each_prompt_of_a_request_has_its_own_span(traced_url, spans, llm):
    assert httpx.post(traced_url + COMPLETIONS, json={**BODY, "prompt": ["one", "two", "three"]}).status_code == 200
    requests = spans()[f"text_completion {llm.model_name}"]
    assert sorted(span.attributes["gen_ai.usage.input_tokens"] for span in requests) == [3, 3, 5]


def test_embeddings_have_no_decode(traced_url, spans, llm):
    assert httpx.post(f"{traced_url}/v1/embeddings", json={"input": ["one", "three"]}).status_code == 200
    found = spans()
    assert {name: len(some) for name, some in found.items() if name != "decode"} == {
        "POST /v1/embeddings": 1, f"embeddings {llm.model_name}": 2, "queue": 2, "prefill": 2
    }  # fmt: skip


def test_no_text_and_no_caller_is_in_a_span(traced_url, spans):
    secret = "a secret of somebody"
    sent = {**BODY, "prompt": secret, "stop": ["another secret"], "user": "secret user", "cache_salt": "secret salt"}
    assert httpx.post(traced_url + COMPLETIONS, json=sent).status_code == 200
    for span in itertools.chain.from_iterable(spans().values()):
        assert "secret" not in span.to_json()


def test_the_callers_trace_goes_on(traced_url, spans):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    assert httpx.post(traced_url + COMPLETIONS, json=BODY, headers=headers).status_code == 200
    found = spans()
    (root,) = found[f"POST {COMPLETIONS}"]
    assert f"{root.parent.span_id:016x}" == PARENT
    assert {f"{span.context.trace_id:032x}" for spans in found.values() for span in spans} == {TRACE}
    assert root.context.trace_state["vendor"] == "1"


def test_a_caller_that_samples_nothing_gets_nothing(traced_url, spans, exporter):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    assert httpx.post(traced_url + COMPLETIONS, json=BODY, headers=headers).status_code == 200
    assert httpx.post(traced_url + COMPLETIONS, json=BODY).status_code == 200
    assert len(spans()[f"POST {COMPLETIONS}"]) == 1


@pytest.mark.parametrize("parent", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", "00-\xff-1-01", "x" * 10000])
def test_a_traceparent_that_is_none_is_ignored(traced_url, spans, parent):
    headers = {"traceparent": parent.encode("latin-1")}
    assert httpx.post(traced_url + COMPLETIONS, json=BODY, headers=headers).status_code == 200
    assert spans()[f"POST {COMPLETIONS}"][0].parent is None


def test_refused_requests_and_probes(traced_url, spans):
    assert httpx.get(f"{traced_url}/health").status_code == 200
    assert httpx.post(traced_url + COMPLETIONS, json={**BODY, "max_tokens": -1}).status_code == 400
    found = spans()
    assert set(found) == {f"POST {COMPLETIONS}"}
    (root,) = found[f"POST {COMPLETIONS}"]
    assert root.attributes["http.response.status_code"] == 400
    assert root.status.status_code is StatusCode.UNSET  # the client's fault is no fault of the server's


def test_a_step_that_fails_is_an_error(watcher, spans):
    with (
        gated_llm(wrap=Broken) as (llm, gate),
        serving(llm, served_model_names=("served",), watchers=(watcher,)) as url,
    ):
        gate.inner.failures = 1
        gate.open()
        assert httpx.post(url + COMPLETIONS, json=BODY).status_code == 500
        (root,) = spans()[f"POST {COMPLETIONS}"]
    assert root.status.status_code is StatusCode.ERROR
    assert root.attributes["http.response.status_code"] == 500


def test_a_client_that_leaves(watcher, spans):
    ended = threading.Semaphore(0)
    with gated_llm() as (llm, gate), serving(llm, ended, served_model_names=("served",), watchers=(watcher,)) as url:
        with posted(url, COMPLETIONS, {**BODY, "max_tokens": 400, "stream": True}):
            gate.stand_in_step(4)
        assert ended.acquire(timeout=PATIENCE)
        gate.open()
        (request,) = spans()[f"text_completion {llm.model_name}"]
    assert request.status.status_code is StatusCode.ERROR
    assert request.attributes["error.type"] == "broken_off"
    assert request.attributes["gen_ai.usage.output_tokens"] >= 1


class Sink(ThreadingHTTPServer):
    """A collector: keeps what it is sent, once it may answer."""

    daemon_threads = True

    def __init__(self):
        self.sent = []
        self.may_answer = threading.Event()
        super().__init__(("127.0.0.1", 0), _SinkHandler)

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"


class _SinkHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.may_answer.wait(30)
        self.server.sent.append((self.path, self.headers["Content-Type"], body))
        with contextlib.suppress(OSError):
            self.send_response(200)
            self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def sink():
    server = Sink()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.may_answer.set()
    server.shutdown()
    thread.join(10)
    server.server_close()


def test_spans_arrive_at_a_collector(llm, sink, monkeypatch):
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=here")
    sink.may_answer.set()
    with (
        exported_spans(sink.endpoint) as watchers,
        serving(llm, served_model_names=("served",), watchers=watchers) as url,
    ):
        assert httpx.post(url + COMPLETIONS, json=BODY).status_code == 200
    ((path, kind, body),) = sink.sent
    assert (path, kind) == ("/v1/traces", "application/x-protobuf")
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    told = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert (told["service.name"], told["deployment.environment.name"]) == ("kvarn", "here")
    names = {span.name for scope in resource.scope_spans for span in scope.spans}
    assert names == {f"POST {COMPLETIONS}", f"text_completion {llm.model_name}", "queue", "prefill", "decode"}


def test_requests_do_not_wait_for_a_collector_that_hangs(llm, sink, monkeypatch):
    monkeypatch.setattr("kvarn.server.spans.MAX_QUEUED_SPANS", 16)
    monkeypatch.setattr("kvarn.server.spans.CLOSING_SECONDS", 0.2)
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "16")
    with (
        exported_spans(sink.endpoint) as watchers,
        serving(llm, served_model_names=("served",), watchers=watchers) as url,
        httpx.Client(base_url=url) as client,
    ):
        for _ in range(20):  # 100 spans, many more than the queue has room for
            assert client.post(COMPLETIONS, json=BODY).status_code == 200
    assert not sink.sent  # neither the requests nor the end have waited


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("https://collector/", "https://collector/v1/traces"),
        ("http://[::1]:4318/own/path", "http://[::1]:4318/own/path"),
    ],
)
def test_where_traces_go(endpoint, url):
    assert traces_url(endpoint) == url


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:4318", "grpc://a:4317", "http://", "http://a:b", "http://[::1"])
def test_an_endpoint_that_is_none_is_refused(endpoint):
    with pytest.raises(ConfigError, match="otlp_endpoint must be a URL such as"), exported_spans(endpoint):
        pass


def test_without_the_extra_the_next_step_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvarn.server.spans", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvarn\[otel\]'"), exported_spans("http://127.0.0.1:1"):
        pass


def test_a_server_without_an_endpoint_does_not_import_it():
    code = (
        "import sys, kvarn.server, kvarn.server.app, kvarn.server.otlp\n"
        "with kvarn.server.otlp.exported_spans(None) as watchers: assert not watchers\n"
        "late = ('opentelemetry.sdk', 'opentelemetry.exporter', 'prometheus_client')\n"
        "found = [module for module in sys.modules if module.startswith(late)]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
