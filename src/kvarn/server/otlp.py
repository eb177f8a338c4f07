"""Opens what `--otlp-endpoint` names. OpenTelemetry is imported only where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

from kvarn.errors import ConfigError
from kvarn.server.watching import HttpWatcher

TRACES_PATH = "/v1/traces"


def traces_url(endpoint: str) -> str:
    """Where a collector takes traces: the path that OTLP has for them, unless the endpoint has one of its own.

    Raises ConfigError for what is no http or https URL.
    """
    try:
        parts = urlsplit(endpoint)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise ConfigError(f"otlp_endpoint must be a URL such as http://127.0.0.1:4318, not {endpoint[:100]!r}")
    if parts.path in ("", "/"):
        parts = parts._replace(path=TRACES_PATH)
    return parts.geturl()


@contextmanager
def exported_spans(endpoint: str | None) -> Iterator[Sequence[HttpWatcher]]:
    """What watches requests and sends their spans to the endpoint, until the context ends; nothing where it is None.

    Raises ConfigError for a wrong endpoint, and where the extra is not installed.
    """
    if endpoint is None:
        yield ()
        return
    url = traces_url(endpoint)
    try:
        from kvarn.server.spans import SpanWatcher
    except ImportError as error:
        raise ConfigError(f"--otlp-endpoint needs pip install 'kvarn[otel]' ({error})") from None
    watcher = SpanWatcher.exporting_to(url)
    try:
        yield (watcher,)
    finally:
        watcher.close()
